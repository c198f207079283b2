"""The two shapes of a reply, whole and in chunks: OpenAI's objects for completions and for chat."""

import secrets
import time
from typing import Any

from dougong.serve.calls import Call
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

    def whole(self, choices: list[tuple[str, list[Told], str]], calls: list[list[Call]]) -> dict[str, Any]:
        """All choices as (text, tokens, finish); `calls` are those of each choice."""
        return self.envelope(self.whole_kind, [
            {"index": index, "finish_reason": _finish(finish, bool(called)), **self.content(text, called),
             "logprobs": self.tell(tokens)}
            for index, ((text, tokens, finish), called) in enumerate(zip(choices, calls))])

    def chunk(self, index: int, piece: Piece, called: bool = False) -> dict[str, Any]:
        """What became certain of one choice; `called`: it has made a call by now."""
        told = self.tell(piece.tokens) if piece.tokens or self.logprobs is None else None
        return self.envelope(self.chunk_kind, [{
            "index": index, "finish_reason": _finish(piece.finish, called) if piece.finish else None,
            **self.delta(piece), "logprobs": told}])

    def content(self, text: str, calls: list[Call]) -> dict[str, Any]:
        raise NotImplementedError

    def delta(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def tell(self, tokens: list[Told]) -> dict[str, Any] | None:
        raise NotImplementedError


class ChatReply(Reply):
    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def content(self, text: str, calls: list[Call]) -> dict[str, Any]:
        called = {"tool_calls": [call.told() for call in calls]} if calls else {}
        return {"message": {"role": "assistant", "content": text or (None if calls else ""), "refusal": None,
                            **called}}

    def delta(self, piece: Piece) -> dict[str, Any]:
        return {"delta": {**({"content": piece.text} if piece.text else {}),
                          **({"tool_calls": piece.calls} if piece.calls else {})}}

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

    def content(self, text: str, calls: list[Call]) -> dict[str, Any]:
        return {"text": text}

    def delta(self, piece: Piece) -> dict[str, Any]:
        return {"text": piece.text}

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


def _finish(finish: str, called: bool) -> str:
    return "tool_calls" if called and finish == "stop" else FINISH[finish]


def _number(logprob: float | None) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what cannot be."""
    return -9999.0 if logprob is None else max(logprob, -9999.0)
