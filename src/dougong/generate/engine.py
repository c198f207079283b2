"""The engine: prompts of token ids in, one token per unfinished row and step out. It knows no text."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dougong.core.errors import ConfigError
from dougong.generate.cache import KVCache
from dougong.generate.fused import fuse
from dougong.generate.lanes import Reading
from dougong.generate.program import Program
from dougong.generate.sampling import Draws, SamplingConfig, choose, log_probabilities
from dougong.nn.attention import Cache
from dougong.nn.lora import adapters
from dougong.nn.position import Span
from dougong.runtime.device import Runtime, multiplies_bf16
from dougong.runtime.seeds import derive

Finish = Literal["stop", "length", "context", "error"]


@dataclass(frozen=True, slots=True)
class Token:
    """One token of one row. `finish` says why the row ends with it: a stop id, enough tokens, a full context, or an
    error (only from a Scheduler), which `error` explains; there is then no token, and `id` is -1.
    """

    row: int
    id: int
    finish: Finish | None = None
    logprob: float | None = None
    alternatives: list[tuple[int, float]] | None = None
    error: str | None = None


@dataclass(slots=True)
class _Row:
    """A continuation in progress: all its tokens, and where the part the model reads begins."""

    index: int
    tokens: list[int]
    prompt_length: int
    draws: Draws
    window: int = 0
    done: bool = False

    @property
    def read(self) -> list[int]:
        return self.tokens[self.window:]


class Engine:
    """A model ready to decode: its weights in the compute dtype, in evaluation mode, parts fused (`fused`); on a CPU
    the next token of a few rows is computed in C where it can be (`program`).

    The given model is left untouched. Make an engine after training it further: matrices are converted and
    joined once, since the leaves would otherwise cast them at every token.
    """

    def __init__(self, model: nn.Module, runtime: Runtime = Runtime()) -> None:  # noqa: B008 (a frozen value)
        self.runtime = runtime
        ready: Any = _for_inference(model, runtime)        # a LanguageModel and a Module, which no type says
        self.program = Program.of(ready) if runtime.device.type == "cpu" else None
        self.model: Any = fuse(ready)
        config = getattr(model, "config", None)
        self.context: int | None = getattr(config, "context", None)
        self.vocab_size: int | None = getattr(config, "vocab_size", None)

    def start(self, prompts: Sequence[Sequence[int]], config: SamplingConfig, *, stop_ids: Iterable[int] = (),
              samples: Sequence[int] | None = None, vocab_size: int | None = None) -> "Decoding":
        """Begins one continuation of each prompt, as one batch; `samples[i]` (default 0) says which sample of
        its prompt row i draws.

        A row's draws depend on `config.seed` and its sample number alone, so a text never depends on what
        else is in the batch, nor on the prompt's place in it. Equal prompts are read once. Raises ConfigError
        for an empty prompt, one with tokens that the model does not know, or one longer than the context under
        `long_prompt="error"`.
        """
        samples = samples if samples is not None else [0] * len(prompts)
        rows = []
        for i, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
            tokens = self.fit(prompt, config, vocab_size)
            rows.append(_Row(i, tokens, len(tokens), Draws(sample_seed(config.seed, sample))))
        return Decoding(self, rows, config, frozenset(stop_ids), vocab_size)

    def fit(self, tokens: Sequence[int], config: SamplingConfig, vocab_size: int | None = None) -> list[int]:
        """The prompt as the model will read it. Raises ConfigError where it cannot."""
        tokens = [int(token) for token in tokens]
        if not tokens:
            raise ConfigError("a prompt has no tokens, and the model needs one to predict the next. "
                              "Begin it with the tokenizer's document_id.")
        if self.context is not None and len(tokens) > self.context:
            if config.long_prompt == "error":
                raise ConfigError(f"a prompt has {len(tokens)} tokens; the model reads at most {self.context}. "
                                  "Shorten it, or keep its end with long_prompt=truncate (--truncate).")
            tokens = tokens[-self.context:]
        vocabulary = vocab_size or self.vocab_size
        if vocabulary is not None and not all(0 <= token < vocabulary for token in tokens):
            raise ConfigError(f"a prompt has the token {next(t for t in tokens if not 0 <= t < vocabulary)}; the model "
                              f"knows 0 to {vocabulary - 1}. Encode it with the model's own tokenizer.")
        return tokens

    @torch.inference_mode()
    def read(self, tokens_BT: Tensor, cache: KVCache | Reading, lengths: Sequence[int] | None = None) -> Tensor:
        """Reads T tokens of every row into the cache; returns the logits after the last, (B V), or after the first
        `lengths[b]` of row b, where rows are padded on the right.
        """
        rows, T = tokens_BT.shape
        if self.program is not None and T == 1 and rows <= self.program.most and (columns := cache.columns()):
            span = Span(T=1, device=tokens_BT.device, length=cache.length, start_B=cache.start_B)
            logits_BV = self.program(tokens_BT, columns, span)
            cache.advance(1)
            return logits_BV
        hidden_BTD = self.model.hidden(tokens_BT.to(self.runtime.device), cache=cache)
        if lengths is None:
            return self.model.head(hidden_BTD[:, -1])
        last_B = torch.tensor(lengths, device=hidden_BTD.device) - 1
        return self.model.head(hidden_BTD[torch.arange(len(last_B), device=hidden_BTD.device), last_B])

    @torch.inference_mode()
    def read_each(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        """Reads T tokens of every row into the cache; returns the logits after each of them, (B T V)."""
        return self.model.head(self.model.hidden(tokens_BT.to(self.runtime.device), cache=cache))


@dataclass
class Decoding:
    """A batch being written. Iterating yields, step by step, the new tokens of the rows that are not
    finished.

    `stop(row)` ends a row from outside (a stop string, a reader who left). A finished row leaves the batch
    before the next step, so the batch shrinks. No family reads past its context: rotary positions beyond
    those trained on exist but mean nothing to the model, so a full context ends the row, or slides
    (`at_context_end`).
    """

    engine: Engine
    _rows: list[_Row]
    config: SamplingConfig
    stop_ids: frozenset[int]
    vocab_size: int | None = None
    _logits: Tensor | None = field(init=False, default=None)
    _seen: Tensor | None = field(init=False, default=None)
    _counts: Tensor | None = field(init=False, default=None)

    def __iter__(self) -> Iterator[list[Token]]:
        return self

    @torch.inference_mode()
    def __next__(self) -> list[Token]:
        if self._logits is None:
            self._prefill_prompts()
        else:
            self._drop_finished()
            if not self._rows:
                raise StopIteration
            self._advance()
        assert self._logits is not None
        logits_BV = self._logits[:, :self.vocab_size]
        uniforms = [row.draws.next() for row in self._rows] if self.config.temperature else None
        ids_B = choose(logits_BV, self.config, uniforms, self._seen, self._counts)
        if self._seen is not None:
            self._seen.scatter_(1, ids_B[:, None], True)
        if self._counts is not None:
            self._counts.scatter_add_(1, ids_B[:, None], torch.ones_like(ids_B, dtype=torch.float)[:, None])
        return self._record(ids_B, logits_BV)

    def stop(self, row: int) -> None:
        """Ends a row; harmless where it has ended already."""
        for held in self._rows:
            held.done |= held.index == row

    def _record(self, ids_B: Tensor, logits_BV: Tensor) -> list[Token]:
        ids = ids_B.tolist()
        told: list[tuple[Any, Any]] = [(None, None)] * len(ids)
        if self.config.logprobs is not None:
            told = list(zip(*log_probabilities(logits_BV, ids_B, self.config.logprobs)))
        step = []
        for b, (row, id) in enumerate(zip(self._rows, ids)):
            row.tokens.append(id)
            finish = self._finish(row)
            row.done = finish is not None
            step.append(Token(row.index, id, finish, *told[b]))
        return step

    def _finish(self, row: _Row) -> Finish | None:
        if row.tokens[-1] in self.stop_ids:
            return "stop"
        if len(row.tokens) - row.prompt_length >= self.config.max_tokens:
            return "length"
        return "context" if self._full(row) and self.config.at_context_end == "stop" else None

    def _full(self, row: _Row) -> bool:
        """Whether the row's newest token has no place left in the context."""
        return self.engine.context is not None and len(row.tokens) - row.window > self.engine.context

    def _prefill_prompts(self) -> None:
        """Reads each different prompt once, then gives every row its copy."""
        different = list(dict.fromkeys(tuple(row.tokens) for row in self._rows))
        place = {tokens: i for i, tokens in enumerate(different)}
        copies = [place[tuple(row.tokens)] for row in self._rows]
        self._prefill([list(tokens) for tokens in different])
        assert self._logits is not None
        if copies != list(range(len(different))):
            self._cache.keep(copies)
            self._logits = self._logits[torch.tensor(copies, device=self._logits.device)]
        if self.config.counts:
            self._counts = torch.zeros_like(self._logits[:, :self.vocab_size], dtype=torch.float)
        if self.config.repetition_penalty != 1:
            self._seen = torch.zeros_like(self._logits[:, :self.vocab_size], dtype=torch.bool)
            for seen_V, row in zip(self._seen, self._rows):
                seen_V[torch.tensor(row.tokens, device=seen_V.device)] = True

    def _prefill(self, texts: list[list[int]]) -> None:
        """Reads whole texts into a new cache, left-padded to the longest."""
        width = max(map(len, texts))
        tokens_BT = torch.zeros(len(texts), width, dtype=torch.long)
        for row_T, text in zip(tokens_BT, texts):
            row_T[width - len(text):] = torch.tensor(text)
        start_B = torch.tensor([width - len(text) for text in texts], device=self.engine.runtime.device)
        self._cache = KVCache(start_B=start_B, reserve=width + min(self.config.max_tokens, 256))
        self._logits = self.engine.read(tokens_BT, self._cache)

    def _advance(self) -> None:
        """Reads the newest token of every row; where a context is full, reads every row's window again
        instead.
        """
        full = [row for row in self._rows if self._full(row)]
        for row in full:
            assert self.engine.context is not None
            row.window = len(row.tokens) - (self.engine.context + 1) // 2
        if full:
            self._prefill([row.read for row in self._rows])
        else:
            newest_B1 = torch.tensor([[row.tokens[-1]] for row in self._rows])
            self._logits = self.engine.read(newest_B1, self._cache)

    def _drop_finished(self) -> None:
        keep = [b for b, row in enumerate(self._rows) if not row.done]
        if len(keep) == len(self._rows):
            return
        self._rows = [self._rows[b] for b in keep]
        if keep:
            self._cache.keep(keep)
            if self._seen is not None:
                self._seen = self._seen[torch.tensor(keep, device=self._seen.device)]
            if self._counts is not None:
                self._counts = self._counts[torch.tensor(keep, device=self._counts.device)]


def sample_seed(seed: int, sample: int) -> int:
    """The first sample has the request's own seed; the others each a stream of their own."""
    return seed if sample == 0 else derive(seed, "sample", sample)


def _for_inference(model: nn.Module, runtime: Runtime) -> nn.Module:
    """A copy of the module tree in evaluation mode, its parameters in the compute dtype. On a CPU that has no products
    of bf16, weights of bf16 are widened as they are used, and what is computed with them is float32.

    deepcopy's memo already holds the converted tensors, so no second fp32 copy is made on the way. What is adapted is
    merged from the numbers that were trained, and rounded once.
    """
    adapted = list(adapters(model).values())
    memo: dict[int, object] = {id(part): part.merged().to(runtime.device, runtime.dtype) for part in adapted}
    inside = {id(tensor) for part in adapted for tensor in (*part.parameters(), *part.buffers())}
    memo |= {id(buffer): buffer.to(runtime.device) for buffer in model.buffers() if id(buffer) not in inside}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            ready = parameter.detach().to(runtime.device, runtime.dtype)
            memo[id(parameter)] = nn.Parameter(ready, requires_grad=False)
    copied: Any = copy.deepcopy(model, memo).eval().requires_grad_(False)
    if hasattr(copied, "compute_dtype"):
        plain = runtime.device.type == "cpu" and runtime.dtype == torch.bfloat16 and not multiplies_bf16()
        copied.compute_dtype = torch.float32 if plain else runtime.dtype
    return copied
