"""One request from its body to its last token: prompts encoded, texts written together, time and tokens counted."""

import asyncio
import secrets
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from dougong.generate.grammar import Grammar
from dougong.serve.bodies import ChatBody, CompletionBody, Writing
from dougong.serve.calls import CallReader, SpelledOut
from dougong.serve.errors import ApiError
from dougong.serve.keys import Client
from dougong.serve.metrics import Metrics
from dougong.serve.model import ServedModel
from dougong.serve.replies import ChatReply, Reply, TextReply
from dougong.serve.settings import ServeConfig
from dougong.serve.tool_bodies import NamedTool, Tool
from dougong.serve.tools import grammar_of
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
        """Encodes the prompts and makes the engine's requests. Raises ApiError or ConfigError for what cannot be, and
        for a client at its limit before anything is encoded for it."""
        body, model = self.body, self.model
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options has no effect without stream.", param="stream_options",
                           code="invalid_value")
        most = self._most_tokens()
        self._tools, self._free = self._callable()
        self._check_choices()
        self.client.check()
        prompts = await self._prompts()
        stop_ids = self._stop_ids()
        chat = isinstance(body, ChatBody)
        own_end = sorted(model.template.stop_ids) if chat else []
        if self._tools:
            grammar = await self._calls_grammar(own_end[0])
        else:
            grammar = await model.structured.compile(body.response_format,
                                                     own_end[0] if own_end else model.tokenizer.document_id)
        self.constrained = "" if grammar is None else "tools" if self._tools else "response_format"
        stops = [*body.stops, *(model.template.stops if chat and grammar is None else ())]
        codec = SpelledOut(model.tokenizer) if self._tools else model.tokenizer
        if self._tools:
            stops = []      # a call's reader looks for them in the text before the calls
        self.prompt_tokens, self.requests, self.writers, self.readers = 0, [], [], []
        for ids in prompts:
            prompt, tokens = model.fit(ids, body, most)
            sampling = model.sampling(body, max_tokens=tokens, seed=self.seed % 2**64, logprobs=self.logprobs)
            self.prompt_tokens += len(prompt)
            for sample in range(body.n):
                self.requests.append(model.request(prompt, sampling, sample=sample, stop_ids=stop_ids,
                                                   grammar=grammar))
                self.writers.append(Writer(codec, prompt, stops, hidden=stop_ids,
                                           strip=chat and not model.template.own))
                self.readers.append(CallReader(model.calls("tools"), free=self._free, stops=tuple(body.stops))
                                    if self._tools else None)

    async def whole(self) -> dict[str, Any]:
        """The finished reply."""
        told: list[list[Told]] = [[] for _ in self.writers]
        async with aclosing(self._pieces()) as pieces:
            async for index, piece in pieces:
                told[index] += piece.tokens
        self._log()
        texts = [writer.text if reader is None else reader.content
                 for writer, reader in zip(self.writers, self.readers)]
        choices = [(text, told[i], self.writers[i].finish or "time") for i, text in enumerate(texts)]
        calls = [[] if reader is None else reader.calls for reader in self.readers]
        return {**self.reply.whole(choices, calls), **self._counts()}

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
                yield self._chunk(*self._first)
            async for index, piece in pieces:
                if piece.text or piece.calls or piece.finish or (piece.tokens and self.logprobs is not None):
                    yield self._chunk(index, piece)
        except ApiError as error:
            yield error.body()
            return
        self._log()
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield {**reply.envelope(reply.chunk_kind, []), **self._counts()}

    def _chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        reader = self.readers[index]
        return self.reply.chunk(index, piece, reader is not None and bool(reader.calls))

    async def _pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """What becomes certain, as (choice, piece). Closing it stops the engine's work on it.

        The prompts are charged once the engine has them, unless the time is over before a token could be written.
        """
        self.client.enter()
        read = 0
        try:
            async with self.model.runner.read(self.requests) as reader:
                read = self.prompt_tokens
                deadline = self.begin + self.config.request_seconds
                while True:
                    try:
                        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                            step = await anext(reader, None)
                    except TimeoutError:
                        read = 0 if self.first is None else read
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
                            piece = self._read_calls(index, writer.write(token))
                            if piece.stop is not None:
                                reader.stop(index)
                            yield index, piece
        finally:
            written = sum(writer.count for writer in self.writers)
            self.client.leave(read + written)
            self.metrics.prompt_tokens.labels(self.model.name).inc(read)
            if self.first is not None:
                self.metrics.first.labels(self.model.name).observe(self.first - self.begin)
                self.metrics.whole.labels(self.model.name).observe(time.monotonic() - self.begin)

    def _failure(self, said: str) -> ApiError:
        """A constraint that breaks on the way (a pattern that explodes) is its sender's; all else is the model's."""
        if self.constrained and "structured text" in said:
            return ApiError(400, f"{self.constrained}: {said}.", param=self.constrained,
                            code=f"invalid_{self.constrained}")
        return ApiError(500, f"the model could not go on: {said}.", code="model_error")

    def _out_of_time(self) -> list[tuple[int, Piece]]:
        if self.first is None:
            raise ApiError(408, f"no token could be written within {self.config.request_seconds:g} s.",
                           code="request_timeout", retry_after=self.model.runner.wait_seconds())
        self.ended_by_time = True
        return [(i, self._read_calls(i, writer.close("time"))) for i, writer in enumerate(self.writers)
                if writer.finish is None]

    def _read_calls(self, index: int, piece: Piece) -> Piece:
        """The piece with its calls told apart from its text, where there may be some."""
        if (reader := self.readers[index]) is not None:
            reader.read(piece)
            self.writers[index].finish = piece.finish
        return piece

    def _callable(self) -> tuple[list[Tool], bool]:
        """The tools that the reply may call, and whether it may also be text. Raises ApiError for what does not fit."""
        body = self.body
        choice = getattr(body, "tool_choice", None)
        tools: list[Tool] = getattr(body, "tools", [])
        if not tools:
            if choice not in (None, "none", "auto"):
                raise ApiError(400, "tool_choice asks for a call, but there are no tools.", param="tool_choice",
                               code="invalid_value")
            return [], True
        names = [tool.function.name for tool in tools]
        if len(set(names)) < len(names):
            raise ApiError(400, "two tools have the same name.", param="tools", code="invalid_value")
        if choice == "none":
            return [], True
        self.model.calls("tools")
        if body.response_format is not None and body.response_format.type != "text":
            raise ApiError(400, "a reply is either held to response_format or may call tools. Leave one out, or send "
                           "\"tool_choice\": \"none\".", param="response_format", code="invalid_value")
        if isinstance(choice, NamedTool):
            if choice.function.name not in names:
                raise ApiError(400, f"tool_choice names {choice.function.name!r}; the tools are {', '.join(names)}."
                               [:500], param="tool_choice", code="invalid_value")
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
        return tools, choice in (None, "auto")

    async def _calls_grammar(self, stop_id: int) -> Grammar:
        assert isinstance(self.body, ChatBody)
        functions = [tool.function.model_dump() for tool in self._tools]
        several = self.body.parallel_tool_calls and not isinstance(self.body.tool_choice, NamedTool)
        spelling, template = self.model.calls("tools"), self.model.template
        return await self.model.structured.lark(
            lambda: grammar_of(spelling, template, functions, free=self._free, several=several), stop_id, "tools")

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

    def _check_choices(self) -> None:
        """Raises ApiError for more texts than the server writes, and for several that would be the same."""
        body = self.body
        prompts = 1 if isinstance(body, ChatBody) else len(texts_in(body.prompt))
        if prompts * body.n > self.config.choices:
            raise ApiError(400, f"{prompts} prompts with n={body.n} are {prompts * body.n} texts; this server writes "
                           f"at most {self.config.choices} for one request.", param="n", code="too_many_choices")
        if body.temperature == 0 and body.n > 1:
            raise ApiError(400, f"n={body.n} continuations at temperature=0 (or top_p=0) would all be the same. Set "
                           "n=1, or a temperature above 0.", param="n", code="invalid_value")

    async def _prompts(self) -> list[list[int]]:
        body, model = self.body, self.model
        if isinstance(body, ChatBody):
            tools = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in self._tools]
            return [await model.encode_chat(body.messages, tools)]
        return await encoded(texts_in(body.prompt), model)

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


def texts_in(field: Any) -> list[Any]:
    """The texts, or lists of ids, of a field that may hold one or several."""
    return field if isinstance(field, list) and not isinstance(field[0], int) else [field]


async def encoded(texts: list[Any], model: ServedModel) -> list[list[int]]:
    """Each as ids; the event loop has a turn between two."""
    prompts = []
    for text in texts:
        prompts.append(await model.encode(text) if isinstance(text, str) else text)
        await asyncio.sleep(0)
    return prompts


def _shape(body: Writing) -> tuple[type[Reply], int | None]:
    """Which reply, and how many rivals of each token it tells."""
    if isinstance(body, CompletionBody):
        return TextReply, body.logprobs
    assert isinstance(body, ChatBody)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs has no effect without logprobs=true.", param="top_logprobs",
                       code="invalid_value")
    return ChatReply, (body.top_logprobs or 0) if body.logprobs else None
