"""Text in, text out: prompts are encoded, tokens become text as they come, stop strings cut exactly."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from torch import nn

from dougong.core.errors import CheckpointError, ConfigError
from dougong.generate.engine import Decoding, Engine, Token
from dougong.generate.lanes import BLOCK, width_for
from dougong.generate.request import Request
from dougong.generate.sampling import SamplingConfig
from dougong.generate.scheduler import Scheduler
from dougong.runtime.device import Runtime

AHEAD = 4                 # tokens that a draft model guesses at most, unless told otherwise
_LEFT_CONTEXT = 4         # tokens of the prompt decoded before the first new one
_UNFINISHED = "\ufffd"    # what `decode` writes for bytes that are no character, or not yet


@runtime_checkable
class TextCodec(Protocol):
    """What generation asks of a tokenizer (`data.tokenizer.Tokenizer`)."""

    document_id: int | None
    vocab_size: int

    def encode(self, text: str) -> Sequence[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass
class Generation:
    """One continuation. `finish_reason`: "stop" (end of document or a stop string), "length" or "context".

    `tokens` are all tokens drawn, the stop included, so `decode(tokens)` may be longer than `text`. `seconds`
    run from the start of its batch to its own end. `logprobs` and `alternatives` (nats) stand beside `tokens`
    where asked for.
    """

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    sample: int = 0
    finish_reason: str = ""
    stop: str | None = None
    seconds: float = 0.0
    logprobs: list[float] | None = None
    alternatives: list[list[tuple[int, float]]] | None = None

    @property
    def tokens_per_s(self) -> float:
        return len(self.tokens) / self.seconds if self.seconds else 0.0


def generate(model: nn.Module | Engine, tokenizer: TextCodec, prompts: Sequence[str],
             config: SamplingConfig | None = None, *, runtime: Runtime | None = None,
             stream: Callable[[int, str], None] | None = None, rows: int = 16, draft: Engine | None = None,
             speculate: int | None = None) -> list[Generation]:
    """Continues each prompt `config.n` times; returns the continuations prompt by prompt.

    Every prompt begins with the tokenizer's document_id (where it has one), as every training document does,
    so the empty prompt asks for a new document. At most `rows` continuations are decoded at a time, prompts
    of similar length together; neither changes a text. `stream(index, piece)` receives the pieces of text of
    result `index` as they become certain: whole characters, and nothing that may yet turn out to be a stop
    string. `speculate` tokens are guessed ahead at most, by `draft` (a smaller model of the same tokenizer), else by
    what repeats: faster for few texts at a time, and the text keeps its distribution (`generate.request.Request`).
    Raises ConfigError for what cannot be continued.
    """
    config = config or SamplingConfig()
    speculate = (0 if draft is None else AHEAD) if speculate is None else speculate
    if draft is not None and speculate < 1:
        raise ConfigError("a draft has no effect with speculate=0. Leave the draft out, or guess at least one token.")
    if rows < 1:
        raise ConfigError(f"rows={rows}: at least one row is decoded at a time.")
    engine = model if isinstance(model, Engine) else Engine(model, runtime or Runtime())
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    results = [Generation(prompt, prompt_tokens=len(ids), sample=j)
               for prompt, ids in zip(prompts, encoded) for j in range(config.n)]
    by_length = sorted(range(len(results)), key=lambda i: (-results[i].prompt_tokens, i))
    for begin in range(0, len(by_length), rows):
        group = by_length[begin:begin + rows]
        held, prompts_ids = [results[i] for i in group], [encoded[i // config.n] for i in group]
        decoding = _decoding(engine, tokenizer, prompts_ids, held, config, draft, speculate)
        _generate_group(decoding, tokenizer, prompts_ids, held, config,
                        lambda row, piece, group=group: stream and stream(group[row], piece))
    return results


def encode_prompt(tokenizer: TextCodec, prompt: str) -> list[int]:
    """Ids of what a text goes on from. Raises ConfigError or DataError for what the tokenizer cannot spell."""
    ids = [int(id) for id in tokenizer.encode(prompt)]
    begin = getattr(tokenizer, "begin_id", tokenizer.document_id)   # an imported model may begin otherwise than it ends
    if begin is not None:
        return [begin, *ids]
    if not ids:
        raise ConfigError("the prompt is empty, and this tokenizer has no token that begins a document. "
                          "Give at least one character.")
    return ids


def _decoding(engine: Engine, tokenizer: TextCodec, prompts: list[list[int]], results: list[Generation],
              config: SamplingConfig, draft: Engine | None, speculate: int) -> "Decoding | Speculation":
    stop_ids = frozenset(() if tokenizer.document_id is None else (tokenizer.document_id,))
    samples = [result.sample for result in results]
    if not speculate:
        return engine.start(prompts, config, stop_ids=stop_ids, vocab_size=tokenizer.vocab_size, samples=samples)
    scheduler = Scheduler(engine, max_rows=len(prompts), vocab_size=tokenizer.vocab_size, draft=draft,
                          cache_tokens=sum(width_for(len(ids) + config.max_tokens) for ids in prompts) + 4 * BLOCK)
    return Speculation(scheduler, [Request(ids, config, stop_ids=stop_ids, sample=sample, speculate=speculate)
                                   for ids, sample in zip(prompts, samples)])


class Speculation:
    """A batch written with guesses: what `Decoding` is without them."""

    def __init__(self, scheduler: Scheduler, requests: Sequence[Request]) -> None:
        self._scheduler = scheduler
        self._rows = {scheduler.add(request): index for index, request in enumerate(requests)}

    def __iter__(self) -> Iterator[list[Token]]:
        while self._scheduler.running or self._scheduler.waiting:
            step = []
            for token in self._scheduler.step():
                if token.finish == "error":
                    raise CheckpointError(token.error or "")
                step.append(replace(token, row=self._rows[token.row]))
            yield step

    def stop(self, row: int) -> None:
        """Ends a row from outside; harmless where it has ended already."""
        self._scheduler.cancel(next(id for id, held in self._rows.items() if held == row))


def _generate_group(decoding: "Decoding | Speculation", tokenizer: TextCodec, prompts: list[list[int]],
                    results: list[Generation], config: SamplingConfig, emit: Callable[[int, str], object]) -> None:
    """Decodes one batch to its end, filling `results`."""
    begin = time.perf_counter()
    writers = [_Writer(result, tokenizer, prompt, config.stop) for result, prompt in zip(results, prompts)]
    for step in decoding:
        for token in step:
            writer = writers[token.row]
            if writer.result.finish_reason:      # a guess behind a stop string
                continue
            if piece := writer.write(token):
                emit(token.row, piece)
            if writer.result.finish_reason:
                decoding.stop(token.row)
                writer.result.seconds = time.perf_counter() - begin


class _Writer:
    """Turns one row's tokens into its Generation."""

    def __init__(self, result: Generation, tokenizer: TextCodec, prompt: list[int],
                 stops: Sequence[str]) -> None:
        self.result = result
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stops = StopStrings(stops)

    def write(self, token: Token) -> str:
        """Records a token; returns the text that became certain with it."""
        result = self.result
        result.tokens.append(token.id)
        if token.logprob is not None:
            result.logprobs = [*(result.logprobs or []), token.logprob]
            result.alternatives = [*(result.alternatives or []), token.alternatives or []]
        text = "" if token.finish == "stop" else self._detokenizer.push(token.id)
        if token.finish:
            text += self._detokenizer.end()
        piece, result.stop = self._stops.push(text)
        if result.stop is not None:
            result.finish_reason = "stop"
        elif token.finish:
            piece += self._stops.end()
            result.finish_reason = token.finish
        result.text += piece
        return piece


class Detokenizer:
    """Text of a growing token sequence; a character appears only when all its bytes have come.

    What it writes adds up to `decode` of all tokens. It decodes a few tokens again with each new one, because
    some tokenizers spell a token by what stands before it (SentencePiece's leading space).
    """

    def __init__(self, tokenizer: TextCodec, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_LEFT_CONTEXT:])
        self._written = len(self._ids)   # of `_ids`; the others are half a character

    def push(self, id: int) -> str:
        self._ids.append(id)
        text = self._unwritten()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._ids = self._ids[self._written:]
        self._written = len(self._ids)
        return text

    def end(self) -> str:
        """What is left of an unfinished character, as U+FFFD."""
        text, self._written = self._unwritten(), len(self._ids)
        return text

    def _unwritten(self) -> str:
        return self._tokenizer.decode(self._ids)[len(self._tokenizer.decode(self._ids[:self._written])):]


class StopStrings:
    """Finds the first stop string to be completed, however the text is cut into pieces.

    Text that may be the beginning of a stop string is held back. Where two stop strings are completed by the
    same character, the longer one cuts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.rest = ""   # what came behind the stop string that was found

    def push(self, text: str) -> tuple[str, str | None]:
        """Adds text; returns what is now certain, and the stop string if one is complete."""
        held = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            end, at, stop = min(found)
            self._held, self.rest = "", held[end:]
            return held[:at], stop
        keep = max((size for stop in self._stops for size in range(1, len(stop))
                    if held.endswith(stop[:size])), default=0)
        self._held = held[len(held) - keep:]
        return held[:len(held) - keep], None

    def end(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        return held
