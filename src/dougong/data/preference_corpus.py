"""Prepared judgements: ids and weights of two replies to each prompt, padded to the longest of a batch.

```
DIRECTORY/tokens.npy weights.npy starts.npy   replies one behind the other, two for each record
          split.npy labels.npy
          bytes.npy                           what the tokens of both replies of each record spell (N 2)
          facts.json                          written last
```
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dougong.core.errors import DataError
from dougong.data.batch import Batch
from dougong.data.loader import Loader, batches_in_order
from dougong.data.pack import Fields
from dougong.data.split import SPLITS
from dougong.data.tokenizer import Tokenizer

FORMAT = 3
_MULTIPLE = 8     # lengths are rounded up to it, so that kernels see few shapes


class PreferenceCorpus:
    """What `PreferenceData.prepare` returns. `reference`: the start model's summed log-probabilities (N 2, nats), once
    known."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, *, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context
        self._known = json.loads((directory / "facts.json").read_text("utf-8"))
        self._tokens, self._weights = (
            np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("tokens", "weights"))
        self._starts, self._split, self.labels, self._bytes = (
            np.load(directory / f"{name}.npy") for name in ("starts", "split", "labels", "bytes"))
        self.reference: np.ndarray | None = None
        self.facts = self._gather_facts()

    @property
    def fingerprint(self) -> str:
        """Changes with any id, weight, label or split."""
        return self._known["fingerprint"]

    @property
    def shape(self) -> str:
        """`pairs` (preferred, rejected) or `singles` (a judged reply, and another's for KTO)."""
        return self._known["shape"]

    def __len__(self) -> int:
        return len(self._split)

    def with_reference(self, reference: np.ndarray) -> "PreferenceCorpus":
        """The same judgements, each with what the start model thinks of both replies."""
        assert reference.shape == (len(self), 2)
        other = copy.copy(self)
        other.reference = reference
        return other

    def encoded(self, number: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a prompt with one of the replies, and the weight of each as a target."""
        place = slice(int(self._starts[2 * number + side]), int(self._starts[2 * number + side + 1]))
        return self._tokens[place], self._weights[place]

    def look(self, *, split: str, documents: int, tokens: int, first: int = 0) -> dict[str, Any]:
        """What `data.inspect` shows: both replies of some records, with the weight of each token."""
        from dougong.data.inspect import pieces_of

        names = ("preferred", "rejected") if self.shape == "pairs" else ("judged", "another's")
        shown = []
        for number in map(int, np.flatnonzero(self._split == SPLITS.index(split))[first:first + documents]):
            label = "" if self.shape == "pairs" else " good" if self.labels[number] else " bad"
            for side, name in enumerate(names):
                ids, weight = self.encoded(number, side)
                pieces = [{**piece, "weight": float(value)}
                          for piece, value in zip(pieces_of(self.tokenizer, ids[:tokens]), weight)]
                size = int(self._bytes[number, side])
                shown.append({"id": f"record {number}", "source": name + label, "bytes": size, "tokens": len(ids),
                              "bytes_per_token": size / len(ids), "weight": float(weight.sum()), "pieces": pieces})
        return {"split": split, "documents": shown, "rows": [], "facts": self.facts}

    def loader(self, split: str, *, rows: int, seed: int, rank: int = 0, world_size: int = 1) -> Loader:
        """Endless shuffled batches of `rows` records in all. Raises DataError for an empty split."""
        return Loader([self._pack(split)], rows=rows, seed=seed, fingerprint=f"{self.fingerprint}-{split}", rank=rank,
                      world_size=world_size, name=lambda number: f"record {number}")

    def batches(self, split: str, *, rows: int) -> Iterator[Batch]:
        """Every record of the split once, in order."""
        return batches_in_order([self._pack(split)], rows)

    def all_batches(self, *, rows: int) -> Iterator[Batch]:
        """Every record of every split once, in the order of their numbers."""
        return batches_in_order([PreferencePack(self, np.arange(len(self)))], rows)

    def _pack(self, split: str) -> "PreferencePack":
        numbers = np.flatnonzero(self._split == SPLITS.index(split))
        if not len(numbers):
            filled = [name for i, name in enumerate(SPLITS) if (self._split == i).any()]
            raise DataError(f"the split {split!r} has no judgements. Splits with some: {', '.join(filled)}. "
                            "data.fractions divides them.")
        return PreferencePack(self, numbers)

    def _gather_facts(self) -> dict[str, Any]:
        lengths = np.diff(self._starts).reshape(-1, 2)
        splits = {}
        for number, name in enumerate(SPLITS):
            mine = self._split == number
            rows, longest = int(mine.sum()), int(lengths[mine].max(initial=1))
            splits[name] = _per_token({"documents": rows, "rows": rows, "bytes": int(self._bytes[mine].sum()),
                                       "tokens": int(lengths[mine].sum())})
            splits[name] |= {"sources": {}, "packing": {
                "rows": rows, "documents_cut": self._known["cut"][name],
                "padding_share": 1 - splits[name]["tokens"] / (2 * rows * longest) if rows else 0.0}}
        totals = {name: sum(split[name] for split in splits.values()) for name in ("documents", "bytes", "tokens")}
        return {"kind": "preferences", **self._known, "cut": sum(self._known["cut"].values()),
                "context": self.context, **_per_token(totals), "splits": splits,
                "packing": {"method": "one in a row",
                            "reason": "two replies to a prompt go through the model together"},
                "longest": int(lengths.max()), "tokenizer": self.tokenizer.facts()}


class PreferencePack:
    """Some records of a corpus, as `data.loader` reads them."""

    method = "one in a row"

    def __init__(self, corpus: PreferenceCorpus, numbers: np.ndarray) -> None:
        self.corpus, self.numbers, self.rows, self.context = corpus, numbers, len(numbers), corpus.context

    def fields(self, rows: np.ndarray, phase: int = 0) -> Fields:
        """`tokens`, `targets` (B 2 T, int64), `weight` (B 2 T, float32); `label` (B) of single replies; `reference`
        (B 2, float64) where it is known. T is the longest of the batch, rounded up."""
        corpus, numbers = self.corpus, self.numbers[rows]
        sides = [[corpus.encoded(int(number), side) for side in (0, 1)] for number in numbers]
        longest = max(len(ids) for pair in sides for ids, _ in pair) - 1
        shape = (len(rows), 2, -(-longest // _MULTIPLE) * _MULTIPLE)
        tokens, weight = np.full(shape, corpus.tokenizer.document_id or 0, np.int64), np.zeros(shape, np.float32)
        targets = tokens.copy()
        for row, pair in enumerate(sides):
            for side, (ids, weights) in enumerate(pair):
                here = row, side, slice(0, len(ids) - 1)
                tokens[here], targets[here], weight[here] = ids[:-1], ids[1:], weights[1:]
        fields = {"tokens": tokens, "targets": targets, "weight": weight}
        if corpus.shape == "singles":
            fields["label"] = corpus.labels[numbers]
        if corpus.reference is not None:
            fields["reference"] = corpus.reference[numbers]
        return fields

    def documents(self, row: int, phase: int = 0) -> list[int]:
        return [int(self.numbers[row])]


def _per_token(facts: dict[str, Any]) -> dict[str, Any]:
    return {**facts, "bytes_per_token": facts["bytes"] / facts["tokens"] if facts["tokens"] else 0.0}
