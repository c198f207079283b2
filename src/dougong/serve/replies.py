"""The two shapes of a reply, whole and in chunks: OpenAI's objects for completions and for chat."""

import secrets
import time
from typing import Any

from dougong.serve.model import ServedModel
from dougong.serve.writing import Piece, Told

FINISH = {"stop": "stop", "length": "length", "context": "length", "time": "length"}


class Reply:
    """What both shapes share. `logprobs` is how many rivals of each token were asked for, None for none at all."""

    prefix, whole_kind, chunk_kind = "", "", ""

    def __init__(self, model: ServedModel, logprobs: int | None, seed: int) -> None:
        self.model, self.logprobs, self.seed = model, logprobs, seed
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())

    def envelope(self, kind: str, choices: list[dict]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model.name,
                "system_fingerprint": self.model.fingerprint, "seed": self.seed, "choices": choices}

    def whole(self, choices: list[tuple[str, list[Told], str]]) -> dict[str, Any]:
        """All choices as (text, tokens, finish)."""
        return self.envelope(self.whole_kind, [
            {"index": index, "finish_reason": FINISH[finish], **self.content(text), "logprobs": self.tell(tokens)}
            for index, (text, tokens, finish) in enumerate(choices)])

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        told = self.tell(piece.tokens) if piece.tokens or self.logprobs is None else None
        return self.envelope(self.chunk_kind, [{
            "index": index, "finish_reason": FINISH[piece.finish] if piece.finish else None,
            **self.delta(piece.text), "logprobs": told}])

    def content(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def tell(self, tokens: list[Told]) -> dict[str, Any] | None:
        raise NotImplementedError


class ChatReply(Reply):
    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def opening(self, index: int) -> dict[str, Any]:
        return self.envelope(self.chunk_kind, [{"index": index, "finish_reason": None, "logprobs": None,
                                                "delta": {"role": "assistant", "content": ""}}])

    def tell(self, tokens: list[Told]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        return {"content": [{**self._token(told.id, told.logprob), "top_logprobs": [
            self._token(id, logprob) for id, logprob in told.alternatives[:self.logprobs]]} for told in tokens],
            "refusal": None}

    def _token(self, id: int, logprob: float | None) -> dict[str, Any]:
        text, spelled = self.model.spell(id)
        return {"token": text, "logprob": _number(logprob), "bytes": spelled}


class TextReply(Reply):
    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    delta = content

    def tell(self, tokens: list[Told]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        return {"tokens": [self.model.spell(told.id)[0] for told in tokens],
                "token_logprobs": [_number(told.logprob) for told in tokens],
                "top_logprobs": [self._rivals(told) for told in tokens],
                "text_offset": [told.start for told in tokens]}

    def _rivals(self, told: Told) -> dict[str, float]:
        """Keyed by text, as the shape demands: of tokens with equal text (parts of characters) the likeliest."""
        rivals: dict[str, float] = {}
        for id, logprob in told.alternatives[:self.logprobs]:
            rivals.setdefault(self.model.spell(id)[0], _number(logprob))
        return rivals


def _number(logprob: float | None) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what cannot be."""
    return -9999.0 if logprob is None else max(logprob, -9999.0)
