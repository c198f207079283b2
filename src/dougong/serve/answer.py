"""One request from its body to its last token: prompts encoded, texts written together, time and tokens counted."""

import asyncio
import secrets
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from dougong.serve.bodies import ChatBody, CompletionBody, Writing
from dougong.serve.errors import ApiError
from dougong.serve.keys import Client
from dougong.serve.metrics import Metrics
from dougong.serve.model import ServedModel
from dougong.serve.replies import ChatReply, Reply, TextReply
from dougong.serve.settings import ServeConfig
from dougong.serve.writing import Piece, Told, Writer

_COMPLETION_TOKENS = 16   # OpenAI's default for completions


class Answer:
    """A request that was understood. `prepare` it, then take it `whole` or as `events`; once."""

    def __init__(self, body: CompletionBody | ChatBody, model: ServedModel, client: Client, config: ServeConfig,
                 metrics: Metrics) -> None:
        self.body, self.model, self.client, self.config, self.metrics = body, model, client, config, metrics
        self.begin = time.monotonic()
        self.first: float | None = None
        self._first: tuple[int, Piece] | None = None
        self.ended_by_time = False
        self.seed = secrets.randbits(31) if body.seed is None else body.seed
        shape, self.logprobs = _shape(body)
        self.reply: Reply = shape(model, self.logprobs, self.seed)

    async def prepare(self) -> None:
        """Encodes the prompts and makes the engine's requests. Raises ApiError or ConfigError for what cannot be."""
        body, model = self.body, self.model
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options has no effect without stream.", param="stream_options",
                           code="invalid_value")
        most = self._most_tokens()
        prompts = await self._prompts()
        if len(prompts) * body.n > self.config.choices:
            raise ApiError(400, f"{len(prompts)} prompts with n={body.n} are {len(prompts) * body.n} texts; this "
                           f"server writes at most {self.config.choices} for one request.", param="n",
                           code="too_many_choices")
        if body.temperature == 0 and body.n > 1:
            raise ApiError(400, f"n={body.n} continuations at temperature=0 would all be the same. Set n=1, or a "
                           "temperature above 0.", param="n", code="invalid_value")
        stop_ids = self._stop_ids()
        chat = isinstance(body, ChatBody)
        own_end = sorted(model.template.stop_ids) if chat else []
        grammar = await model.structured.compile(body.response_format,
                                                 own_end[0] if own_end else model.tokenizer.document_id)
        self.constrained = grammar is not None
        stops = [*body.stops, *(model.template.stops if chat and grammar is None else ())]
        self.prompt_tokens, self.requests, self.writers = 0, [], []
        for ids in prompts:
            prompt, tokens = model.fit(ids, body, most)
            sampling = model.sampling(body, max_tokens=tokens, seed=self.seed, logprobs=self.logprobs)
            self.prompt_tokens += len(prompt)
            for sample in range(body.n):
                self.requests.append(model.request(prompt, sampling, sample=sample, stop_ids=stop_ids,
                                                   grammar=grammar))
                self.writers.append(Writer(model.tokenizer, prompt, stops, hidden=stop_ids,
                                           strip=chat and not model.template.own))

    async def whole(self) -> dict[str, Any]:
        """The finished reply."""
        told: list[list[Told]] = [[] for _ in self.writers]
        async with aclosing(self._pieces()) as pieces:
            async for index, piece in pieces:
                told[index] += piece.tokens
        self._log()
        choices = [(writer.text, told[i], writer.finish or "time") for i, writer in enumerate(self.writers)]
        return {**self.reply.whole(choices), **self._counts()}

    async def begun(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces, the first already waited for: what is refused is refused before a status is sent."""
        pieces = self._pieces()
        try:
            self._first = await anext(pieces, None)
        except BaseException:
            await pieces.aclose()
            raise
        return pieces

    async def events(self, pieces: AsyncGenerator[tuple[int, Piece], None]) -> AsyncGenerator[dict, None]:
        """The reply's chunks, of pieces that have `begun`. A failure from here on is told as an event."""
        reply = self.reply
        try:
            if isinstance(reply, ChatReply):
                for index in range(len(self.writers)):
                    yield reply.opening(index)
            if self._first is not None:
                yield reply.chunk(*self._first)
            async for index, piece in pieces:
                if piece.text or piece.finish or (piece.tokens and self.logprobs is not None):
                    yield reply.chunk(index, piece)
        except ApiError as error:
            yield error.body()
            return
        self._log()
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield {**reply.envelope(reply.chunk_kind, []), **self._counts()}

    async def _pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """What becomes certain, as (choice, piece). Closing it stops the engine's work on it."""
        self.client.enter()
        try:
            async with self.model.runner.read(self.requests) as reader:
                deadline = self.begin + self.config.request_seconds
                while True:
                    try:
                        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                            step = await anext(reader, None)
                    except TimeoutError:
                        for piece in self._out_of_time():
                            yield piece
                        break
                    if step is None:
                        break
                    self.first = self.first or time.monotonic()
                    for index, token in step:
                        if token.finish == "error":
                            raise self._failure(token.error or "")
                        writer = self.writers[index]
                        if writer.finish is None:
                            piece = writer.write(token)
                            if piece.stop is not None:
                                reader.stop(index)
                            yield index, piece
        finally:
            written = sum(writer.count for writer in self.writers)
            self.client.leave(self.prompt_tokens + written)
            self.metrics.prompt_tokens.labels(self.model.name).inc(self.prompt_tokens)
            if self.first is not None:
                self.metrics.first.labels(self.model.name).observe(self.first - self.begin)
                self.metrics.whole.labels(self.model.name).observe(time.monotonic() - self.begin)

    def _failure(self, said: str) -> ApiError:
        """A constraint that breaks on the way (a pattern that explodes) is its sender's; all else is the model's."""
        if self.constrained and "structured text" in said:
            return ApiError(400, f"response_format: {said}.", param="response_format", code="invalid_response_format")
        return ApiError(500, f"the model could not go on: {said}.", code="model_error")

    def _out_of_time(self) -> list[tuple[int, Piece]]:
        if self.first is None:
            raise ApiError(408, f"no token could be written within {self.config.request_seconds:g} s.",
                           code="request_timeout", retry_after=self.model.runner.wait_seconds())
        self.ended_by_time = True
        return [(i, writer.close("time")) for i, writer in enumerate(self.writers) if writer.finish is None]

    def _most_tokens(self) -> int:
        body, limit = self.body, self.config.max_tokens
        asked = body.max_tokens
        if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
            if asked is not None:
                raise ApiError(400, "max_tokens and max_completion_tokens say the same; send one.",
                               param="max_tokens", code="invalid_value")
            asked = body.max_completion_tokens
        if asked is None:
            asked = limit if isinstance(body, ChatBody) else min(limit, _COMPLETION_TOKENS)
        if asked > limit:
            raise ApiError(400, f"max_tokens={asked:,}: this server writes at most {limit:,} tokens.",
                           param="max_tokens", code="invalid_value")
        return asked

    async def _prompts(self) -> list[list[int]]:
        body, model = self.body, self.model
        if isinstance(body, ChatBody):
            return [await model.encode_chat([message.plain() for message in body.messages])]
        held: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        if isinstance(held[0], int):
            held = [held]
        return [await model.encode(one) if isinstance(one, str) else one for one in held]

    def _stop_ids(self) -> frozenset[int]:
        end = self.model.tokenizer.document_id
        ends = frozenset() if end is None else frozenset({end})
        return ends | self.model.template.stop_ids if isinstance(self.body, ChatBody) else ends

    def _counts(self) -> dict[str, Any]:
        """Usage in OpenAI's words, and where the time went."""
        now = time.monotonic()
        written = sum(writer.count for writer in self.writers)
        first = self.first or now
        later = written - len(self.writers)
        return {"usage": {"prompt_tokens": self.prompt_tokens, "completion_tokens": written,
                          "total_tokens": self.prompt_tokens + written},
                "timings": {"first_token_ms": round(1000 * (first - self.begin), 3),
                            "total_ms": round(1000 * (now - self.begin), 3),
                            "tokens_per_s": round(later / (now - first), 2) if later > 0 and now > first else None,
                            "ended_by": "time limit" if self.ended_by_time else None}}

    def _log(self) -> None:
        if self.config.log_prompts:
            asked = self.body.model_dump(include={"prompt", "messages"})
            print({**asked, "replies": [writer.text for writer in self.writers]}, file=sys.stderr)


def _shape(body: Writing) -> tuple[type[Reply], int | None]:
    """Which reply, and how many rivals of each token it tells."""
    if isinstance(body, CompletionBody):
        return TextReply, body.logprobs
    assert isinstance(body, ChatBody)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs has no effect without logprobs=true.", param="top_logprobs",
                       code="invalid_value")
    return ChatReply, (body.top_logprobs or 0) if body.logprobs else None
