"""From a stream of documents to rows of one context: contiguous windows, or best fit.

Targets. A row holds `context` tokens and, for each, the token that follows it in the stream; the last token of a
document predicts what ends it (`document_id`). Most tokenizers begin a document with the same token, which then is that
of the next one; where it is another (Llama's), it is read and never predicted. The last document is followed by the
first. Each place of the split has its target exactly once an epoch, in either packing.

*Windows* cut the stream every `context` tokens, whatever documents lie there (as GPT-2 did): right for long
documents. They start at another phase each epoch, so that no token always stands at a border.

*Best fit* (Ding et al. 2024, arXiv:2404.10830) cuts only documents longer than a context; what is left
over goes, longest first, into the row with the smallest gap that takes it. Documents of a row do not see each
other (`segment`).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dougong.core.errors import ConfigError
from dougong.core.files import write_json
from dougong.data.shards import TokenStore

_BLOCK_DOCUMENTS = 1 << 18  # packed together: bounds memory, and is far more than best fit needs to fill rows
Fields = dict[str, np.ndarray]


@dataclass(frozen=True)
class Stream:
    """The documents first … last-1 of a store as one circle of tokens."""

    store: TokenStore
    first: int
    last: int

    @property
    def start(self) -> int:
        return int(self.store.starts[self.first])

    @property
    def tokens(self) -> int:
        return int(self.store.starts[self.last]) - self.start

    def read(self, position: int, length: int) -> np.ndarray:
        """`length` tokens from `position` on; behind the last token comes the first."""
        parts, position = [], position % self.tokens
        while length > 0:
            taken = min(length, self.tokens - position)
            parts.append(self.store.read(self.start + position, self.start + position + taken))
            position, length = 0, length - taken
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def pairs(self, position: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`length` tokens from `position` on, and the target of each."""
        ids, store = self.read(position, length + 1).astype(np.int64), self.store
        tokens, targets = ids[:-1], ids[1:]
        if store.document_id is not None and store.first_id != store.document_id:
            ends = store.starts[self.first + 1:self.last + 1]       # where each document ends
            behind = self.start + (position + np.arange(length)) % self.tokens + 1
            targets = np.where(ends[np.searchsorted(ends, behind)] == behind, store.document_id, targets)
        return tokens, targets

    def documents(self, position: int, length: int) -> list[int]:
        """Numbers (in the store) of the documents that `length` tokens from `position` on belong to."""
        starts, found = self.store.starts[self.first:self.last + 1], []
        while length > 0:
            position %= self.tokens
            taken = min(length, self.tokens - position)
            low = int(np.searchsorted(starts, self.start + position, side="right")) - 1
            high = int(np.searchsorted(starts, self.start + position + taken, side="left"))
            found += [self.first + number for number in range(low, high)]
            position, length = 0, length - taken
        return found


class Windows:
    """Contiguous windows over a stream: a circle, so an epoch has the same number of rows at every phase."""

    method = "windows"

    def __init__(self, stream: Stream, context: int) -> None:
        self.stream, self.context = stream, context
        self.rows = -(-stream.tokens // context)
        self._open_end = stream.store.document_id is None   # then the last token's successor is unknown

    def fields(self, rows: np.ndarray, phase: int) -> Fields:
        """`tokens`, `targets`, `weight` of shape (len(rows), context); `phase` shifts all windows."""
        total, context = self.stream.tokens, self.context
        windows = [self.stream.pairs(phase + int(row) * context, context) for row in rows]
        tokens, targets = (np.stack(parts) for parts in zip(*windows))
        place = rows[:, None].astype(np.int64) * context + np.arange(context)
        weight = place < total  # the last window runs on into the first one's tokens
        if self._open_end:
            weight &= (place + phase) % total != total - 1
        return {"tokens": tokens, "targets": targets, "weight": weight.astype(np.float32)}

    def places(self, rows: np.ndarray, phase: int) -> np.ndarray:
        """Where each token of these rows stands in its split, (len(rows), context)."""
        place = rows[:, None].astype(np.int64) * self.context + np.arange(self.context)
        return self.stream.start + (phase + place) % self.stream.tokens

    def documents(self, row: int, phase: int) -> list[int]:
        """Numbers of the documents in a row."""
        return self.stream.documents(phase + row * self.context, self.context)

    def facts(self) -> dict[str, Any]:
        lengths = np.diff(self.stream.store.starts[self.stream.first:self.stream.last + 1])
        return {
            "method": self.method,
            "context": self.context,
            "rows": self.rows,
            "tokens": self.stream.tokens,
            "documents": len(lengths),
            "documents_cut": int((lengths > self.context).sum()),
            "padding_share": 1 - self.stream.tokens / (self.rows * self.context),
        }


class BestFit:
    """Rows of whole documents and pieces of long ones, read from a pack index on disk."""

    method = "best_fit"

    def __init__(self, stream: Stream, context: int, directory: Path) -> None:
        """`directory` belongs to these documents and this context; the index is made where it is absent."""
        if stream.store.document_id is None:
            raise ConfigError(
                "data.pack=best_fit needs documents with borders, but the tokenizer has no separator.\n"
                "Try tokenizer.separator=true or data.pack=windows."
            )
        self.stream, self.context = stream, context
        if not (directory / "manifest.json").exists():
            _write_index(stream, context, directory)
        self._facts = json.loads((directory / "manifest.json").read_text("utf-8"))
        self.rows: int = self._facts["rows"]
        self._borders, self._starts, self._lengths = (
            np.memmap(directory / f"{name}.i64", dtype="<i8", mode="r")
            for name in ("borders", "starts", "lengths")
        )

    def fields(self, rows: np.ndarray, phase: int = 0) -> Fields:
        """As of `Windows`, and `segment` (the document's number) where a row holds several documents."""
        shape = (len(rows), self.context)
        tokens = np.full(shape, self.stream.store.document_id, dtype=np.int64)
        targets, weight, segment = tokens.copy(), np.zeros(shape, np.float32), np.zeros(shape, np.int64)
        for at, row in enumerate(rows):
            pieces = range(int(self._borders[row]), int(self._borders[row + 1]))
            column = 0
            for number, piece in enumerate(pieces):
                length = int(self._lengths[piece])
                place = slice(column, column + length)
                tokens[at, place], targets[at, place] = self.stream.pairs(int(self._starts[piece]), length)
                segment[at, place] = number
                column += length
            weight[at, :column] = 1
            segment[at, column:] = len(pieces)
        several = any(self._borders[row + 1] - self._borders[row] > 1 for row in rows)
        fields = {"tokens": tokens, "targets": targets, "weight": weight}
        return {**fields, "segment": segment} if several else fields

    def places(self, rows: np.ndarray, phase: int = 0) -> np.ndarray:
        """As of `Windows`; 0 where a row has no token."""
        places = np.zeros((len(rows), self.context), np.int64)
        for at, row in enumerate(rows):
            pieces = slice(int(self._borders[row]), int(self._borders[row + 1]))
            found = [self.stream.start + start + np.arange(length)
                     for start, length in zip(self._starts[pieces], self._lengths[pieces])]
            held = np.concatenate(found)
            places[at, :len(held)] = held
        return places

    def documents(self, row: int, phase: int = 0) -> list[int]:
        """Numbers of the documents in a row."""
        pieces = range(int(self._borders[row]), int(self._borders[row + 1]))
        return [number for piece in pieces
                for number in self.stream.documents(int(self._starts[piece]), int(self._lengths[piece]))]

    def facts(self) -> dict[str, Any]:
        return dict(self._facts)


class WithFields:
    """Rows of another pack with more fields, which `more` looks up by the places of their tokens in the split."""

    def __init__(self, pack: Windows | BestFit, more: Callable[[np.ndarray], Fields]) -> None:
        self._pack, self._more = pack, more
        self.method, self.context, self.rows = pack.method, pack.context, pack.rows

    def fields(self, rows: np.ndarray, phase: int) -> Fields:
        return {**self._pack.fields(rows, phase), **self._more(self._pack.places(rows, phase))}

    def documents(self, row: int, phase: int) -> list[int]:
        return self._pack.documents(row, phase)

    def facts(self) -> dict[str, Any]:
        return self._pack.facts()


def best_fit(lengths: np.ndarray, context: int) -> np.ndarray:
    """The row of each piece (1 … context tokens), packed best fit decreasing; rows count from 0.

    A bit set of the gaps that exist finds the smallest one that is large enough in one machine operation or
    few.
    """
    row_of = np.empty(len(lengths), np.int64)
    with_gap: list[list[int]] = [[] for _ in range(context)]
    gaps = rows = 0
    sizes = lengths.tolist()
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = sizes[piece]
        fitting = gaps >> length
        if fitting:
            gap = length + (fitting & -fitting).bit_length() - 1
            row = with_gap[gap].pop()
            if not with_gap[gap]:
                gaps ^= 1 << gap
        else:
            gap, row, rows = context, rows, rows + 1
        if rest := gap - length:
            with_gap[rest].append(row)
            gaps |= 1 << rest
        row_of[piece] = row
    return row_of


def _write_index(stream: Stream, context: int, directory: Path) -> None:
    """Packs block by block into files of int64: first piece of each row; start and length of each piece."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    rows = pieces = cut = 0
    with (open(directory / "borders.i64", "wb") as borders, open(directory / "starts.i64", "wb") as starts,
          open(directory / "lengths.i64", "wb") as lengths):
        borders.write(np.zeros(1, "<i8").data)
        for first in range(stream.first, stream.last, _BLOCK_DOCUMENTS):
            last = min(first + _BLOCK_DOCUMENTS, stream.last)
            at = np.asarray(stream.store.starts[first:last + 1], dtype=np.int64) - stream.start
            piece_start, piece_length, row_of = _pack_block(at[:-1], np.diff(at), context)
            order = np.argsort(row_of, kind="stable")
            counts = np.bincount(row_of)
            borders.write((pieces + np.cumsum(counts)).astype("<i8").data)
            starts.write(piece_start[order].astype("<i8").data)
            lengths.write(piece_length[order].astype("<i8").data)
            rows, pieces = rows + len(counts), pieces + len(order)
            cut += int((np.diff(at) > context).sum())
        for file in (borders, starts, lengths):
            file.flush()
            os.fsync(file.fileno())
    write_json(directory / "manifest.json", {
        "method": "best_fit", "context": context, "rows": rows, "tokens": stream.tokens, "pieces": pieces,
        "documents": stream.last - stream.first, "documents_cut": cut,
        "padding_share": 1 - stream.tokens / (rows * context)})


def _pack_block(
    starts: np.ndarray, lengths: np.ndarray, context: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, length, row) of every piece: full contexts fill a row each, remainders are fitted together."""
    full = lengths // context
    number = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)    # 0, 1, … within each document
    full_starts = np.repeat(starts, full) + number * context
    rest = lengths - full * context
    rest_starts, rest = (starts + full * context)[rest > 0], rest[rest > 0]
    row_of = np.concatenate([np.arange(len(full_starts)), len(full_starts) + best_fit(rest, context)])
    piece_lengths = np.concatenate([np.full(len(full_starts), context, np.int64), rest])
    return np.concatenate([full_starts, rest_starts]), piece_lengths, row_of


def choose_method(store: TokenStore, context: int) -> tuple[Literal["windows", "best_fit"], str]:
    """The packing that suits the documents, and the reason in a sentence."""
    if store.document_id is None:
        return "windows", "the tokenizer marks no document borders: the text is one stream"
    lengths = np.diff(store.starts)
    long = float(lengths[lengths > context].sum() / max(1, lengths.sum()))
    if long > 0.5:
        return "windows", f"{long:.0%} of the tokens are in documents longer than a context of {context}"
    return "best_fit", f"{1 - long:.0%} of the tokens are in documents that fit a context of {context}"


def index_name(stream: Stream, context: int) -> str:
    """A directory name for the pack index of these documents at this context."""
    documents = hashlib.sha256(f"{stream.first}-{stream.last}".encode()).hexdigest()[:8]
    return f"best-fit-{context}-{documents}"
