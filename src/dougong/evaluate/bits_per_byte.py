"""Exact bits per byte of a language model: every token of every document scored once, over true UTF-8 bytes.

What is counted. A document is read as the token that a text follows (`first_id`) and its tokens, and each of
its tokens is predicted. The `document_id` that ends it is not text and is not scored. The model reads windows of
at most `context` tokens that begin `stride` apart: with stride = context the windows are disjoint, with a smaller
one each window reads again what came before and scores only what is new. A tokenizer without such a token makes
one stream of all documents; its very first token, before which there is nothing to read, costs
ln(vocabulary). Divide by `bytes` and the result is the length of a code from which the texts could be
restored, so it compares with any compressor.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dougong.core.errors import ConfigError, DataError
from dougong.evaluate.calibration import Calibration
from dougong.evaluate.scores import DocumentScores
from dougong.evaluate.statistics import Interval, bits_per_byte_interval
from dougong.runtime.device import Runtime

_GROUP_TOKENS = 1 << 20    # tokens of documents held at a time, which bounds memory
_LOGITS_AT_ONCE = 1 << 23  # logits made at a time (fp32: 32 MiB)


@dataclass(frozen=True)
class BitsPerByte(DocumentScores):
    """A model's scores: per document also its tokens; how they were read; `lossy` documents that the
    tokenizer cannot restore (the figure is then not the length of a code, and must not be compared with a
    compressor's).
    """

    tokens: np.ndarray
    context: int
    stride: int
    lossy: int
    seconds: float

    @property
    def nats_per_token(self) -> float:
        return float(self.nats.sum() / max(int(self.tokens.sum()), 1))

    def interval(self, *, confidence: float = 0.95, seed: int = 0) -> Interval | None:
        """Bootstrap interval of bits_per_byte over documents."""
        return bits_per_byte_interval(self, confidence=confidence, seed=seed)


def bits_per_byte(model: nn.Module, tokenizer, documents: Iterable, *, context: int,
                  stride: int | None = None, runtime: Runtime | None = None, batch_tokens: int = 8192,
                  name: str = "model", poll: Callable[[], None] | None = None,
                  calibration: Calibration | None = None) -> BitsPerByte:
    """Scores every document (`id`, `source`, `text`) and returns the columns.

    `stride` defaults to `context`. `batch_tokens` (tokens of one forward) changes speed and memory only. `poll` is
    called before each forward, and may raise to end the work. `calibration` counts the same tokens, where given.
    Raises ConfigError for a context or stride that cannot be, DataError where there is no text.
    """
    stride = context if stride is None else stride
    limit = getattr(getattr(model, "config", None), "context", None)
    if context < 1 or (limit is not None and context > limit):
        raise ConfigError(f"context={context}: the model reads between 1 and {limit} tokens.")
    if not 1 <= stride <= context:
        raise ConfigError(f"stride={stride} must lie between 1 and context={context}: a longer one would "
                          "leave tokens unscored.")
    begin = time.perf_counter()
    columns = _Columns([], [], [], [], [])
    reader = _Reader(model, runtime or Runtime(), context, stride, batch_tokens, poll, calibration)
    with evaluating(model):
        if (first := tokenizer.first_id) is None:
            _score_stream(reader, tokenizer, documents, columns)
        else:
            _score_documents(reader, tokenizer, documents, columns, first)
    if not sum(columns.bytes):
        raise DataError("there is no text to evaluate: the split holds no documents, or only empty ones.")
    nats = np.array(columns.nats)
    if not np.isfinite(nats).all():
        raise DataError(f"the model's loss is not finite on {int((~np.isfinite(nats)).sum())} documents. Its "
                        "training probably diverged; evaluate an earlier checkpoint.")
    return BitsPerByte(name=name, ids=columns.ids, sources=columns.sources, nats=nats,
                       bytes=np.array(columns.bytes), tokens=np.array(columns.tokens), context=context,
                       stride=stride, lossy=columns.lossy, seconds=time.perf_counter() - begin)


def calibration(model: nn.Module, tokenizer, documents: Iterable, *, context: int, stride: int | None = None,
                runtime: Runtime | None = None) -> Calibration:
    """Only how well calibrated the model is, over the tokens that `bits_per_byte` scores."""
    found = Calibration()
    bits_per_byte(model, tokenizer, documents, context=context, stride=stride, runtime=runtime, calibration=found)
    return found


@dataclass
class _Columns:
    ids: list[str]
    sources: list[str]
    bytes: list[int]
    tokens: list[int]
    nats: list[float]
    lossy: int = 0

    def read(self, document, tokenizer) -> np.ndarray:
        """Notes a document's facts; returns its tokens."""
        text = document.text.encode("utf-8")
        ids = np.asarray(tokenizer.encode(document.text), dtype=np.int64)
        self.ids.append(document.id)
        self.sources.append(document.source)
        self.bytes.append(len(text))
        self.tokens.append(len(ids))
        self.lossy += tokenizer.decode_bytes(ids) != text
        return ids


def _score_documents(reader: "_Reader", tokenizer, documents: Iterable, columns: _Columns, first: int) -> None:
    """Every document alone, after the token `first`; a group of documents at a time."""
    group: list[np.ndarray] = []
    held = 0
    for document in documents:
        group.append(np.concatenate([[first], columns.read(document, tokenizer)]))
        held += len(group[-1])
        if held >= _GROUP_TOKENS:
            columns.nats += [float(nats.sum()) for nats in reader.token_nats(group)]
            group, held = [], 0
    columns.nats += [float(nats.sum()) for nats in reader.token_nats(group)]


def _score_stream(reader: "_Reader", tokenizer, documents: Iterable, columns: _Columns) -> None:
    """All documents as one stream without separators; each token's nats go to the document it is in."""
    ids = [columns.read(document, tokenizer) for document in documents]
    stream = np.concatenate([np.empty(0, dtype=np.int64), *ids])
    if len(stream):
        nats = np.concatenate([[np.log(tokenizer.vocab_size)], reader.token_nats([stream])[0]])
        ends = np.cumsum([len(part) for part in ids])
        columns.nats += [float(part.sum()) for part in np.split(nats, ends[:-1])]


def token_nats(model: nn.Module, sequences: Sequence[np.ndarray], *, context: int, stride: int | None = None,
               runtime: Runtime | None = None, batch_tokens: int = 8192) -> list[np.ndarray]:
    """Nats (float64) of each token of each sequence but its first, given those before it in its window."""
    with evaluating(model):
        reader = _Reader(model, runtime or Runtime(), context, stride or context, batch_tokens)
        return reader.token_nats(sequences)


class _Window(NamedTuple):
    """Tokens [begin, end) of a sequence are read; the targets [first + 1, end + 1) are scored."""

    sequence: int
    begin: int
    first: int
    end: int


class _Reader:
    """Scores windows of many sequences in batches of similar length."""

    def __init__(self, model: Any, runtime: Runtime, context: int, stride: int,
                 batch_tokens: int, poll: Callable[[], None] | None = None,
                 calibration: Calibration | None = None) -> None:
        self.model, self.runtime, self.poll = model, runtime, poll or (lambda: None)
        self.calibration = calibration
        self.context, self.stride, self.batch_tokens = context, stride, batch_tokens

    def token_nats(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        nats = [np.full(max(len(sequence) - 1, 0), np.nan) for sequence in sequences]
        windows = [w for i, sequence in enumerate(sequences) for w in self._windows(i, len(sequence) - 1)]
        windows.sort(key=lambda w: w.begin - w.end)   # longest first: a batch that does not fit fails at once
        for batch in self._batches(windows):
            self.poll()
            self._score(batch, sequences, nats)
        return nats

    def _windows(self, sequence: int, targets: int) -> Iterator[_Window]:
        first = 0
        for begin in range(0, targets, self.stride):
            end = min(begin + self.context, targets)
            yield _Window(sequence, begin, first, end)
            first = end
            if end == targets:
                return

    def _batches(self, windows: list[_Window]) -> Iterator[list[_Window]]:
        begin = 0
        while begin < len(windows):
            width = windows[begin].end - windows[begin].begin
            rows = max(self.batch_tokens // width, 1)
            yield windows[begin:begin + rows]
            begin += rows

    def _score(self, batch: list[_Window], sequences: Sequence[np.ndarray], nats: list[np.ndarray]) -> None:
        """Reads the windows side by side, padded on the right, where no causal model can see it."""
        T = max(w.end - w.begin for w in batch)
        tokens_BT = np.zeros((len(batch), T), dtype=np.int64)
        targets_BT = np.zeros((len(batch), T), dtype=np.int64)
        scored_BT = np.zeros((len(batch), T), dtype=bool)
        for b, w in enumerate(batch):
            tokens_BT[b, :w.end - w.begin] = sequences[w.sequence][w.begin:w.end]
            targets_BT[b, :w.end - w.begin] = sequences[w.sequence][w.begin + 1:w.end + 1]
            scored_BT[b, w.first - w.begin:w.end - w.begin] = True
        spent = self._forward(*(torch.from_numpy(array).to(self.runtime.device)
                                for array in (tokens_BT, targets_BT, scored_BT)))
        at = 0
        for w in batch:
            nats[w.sequence][w.first:w.end] = spent[at:at + w.end - w.first]
            at += w.end - w.first

    @torch.no_grad()
    def _forward(self, tokens_BT: Tensor, targets_BT: Tensor, scored_BT: Tensor) -> np.ndarray:
        """Nats of the scored targets, row by row; logits exist for a part of them at a time."""
        hidden_ND = self.model.hidden(tokens_BT)[scored_BT]
        targets_N = targets_BT[scored_BT]
        first = self.model.head(hidden_ND[:1])
        part = max(_LOGITS_AT_ONCE // first.shape[-1], 1)
        spent = []
        for h_ND, t_N in zip(hidden_ND.split(part), targets_N.split(part)):
            logits_NV = self.model.head(h_ND).float()
            spent.append(F.cross_entropy(logits_NV, t_N, reduction="none"))
            if self.calibration is not None:
                self.calibration.add(logits_NV, t_N)
        return torch.cat(spent).cpu().double().numpy()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the former mode of every part after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
