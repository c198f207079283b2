"""Prepared conversations: ids and weights on disk, packed into rows in which none sees another.

```
DIRECTORY/tokens.i32 weights.f32     every conversation behind the other, little-endian
          conversations.jsonl        the same as it was read
          starts.npy lines.npy bytes.npy trained.npy split.npy source.npy
          facts.json                 written last
```
A conversation of n tokens fills n - 1 places of a row: its last token is only a target.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dougong.core.errors import DataError
from dougong.data.batch import Batch
from dougong.data.conversations import Conversation
from dougong.data.documents import Document
from dougong.data.loader import Loader, batches_in_order
from dougong.data.pack import Fields, best_fit
from dougong.data.split import SPLITS
from dougong.data.tokenizer import Tokenizer

FORMAT = 3
_TEXTS = 200


class ChatCorpus:
    """What `ChatData.prepare` returns."""

    def __init__(self, directory: Path, tokenizer: Tokenizer, *, context: int, pack: bool) -> None:
        self.tokenizer, self.context = tokenizer, context
        self._known = json.loads((directory / "facts.json").read_text("utf-8"))
        self._starts, self._lines, self._bytes, self._trained, self._split, self._source = (
            np.load(directory / f"{name}.npy") for name in ("starts", "lines", "bytes", "trained", "split", "source"))
        self._tokens = np.memmap(directory / "tokens.i32", "<i4", "r")
        self._weights = np.memmap(directory / "weights.f32", "<f4", "r")
        self._text = np.memmap(directory / "conversations.jsonl", np.uint8, "r")
        self._packs = {split: ChatPack(self, np.flatnonzero(self._split == number), context, pack)
                       for number, split in enumerate(SPLITS) if (self._split == number).any()}
        self.facts = self._gather_facts(pack)

    @property
    def fingerprint(self) -> str:
        """Changes with any id, weight or split; not with packing."""
        return self._known["fingerprint"]

    def encoded(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int32) of the conversation with this number, and the weight of each as a target."""
        place = slice(int(self._starts[number]), int(self._starts[number + 1]))
        return self._tokens[place], self._weights[place]

    def length(self, numbers: np.ndarray) -> np.ndarray:
        """Places that these conversations take in a row."""
        return self._starts[numbers + 1] - self._starts[numbers] - 1

    def conversation(self, number: int) -> Conversation:
        line = self._text[int(self._lines[number]):int(self._lines[number + 1])].tobytes()
        return Conversation.from_dict(json.loads(line))

    def conversations(self, split: str) -> "Sequence[Conversation]":
        """Those of a split, each read from disk when asked for."""
        return _Conversations(self, self._pack(split).numbers)

    def documents(self, split: str) -> list[Document]:
        """The words of the first conversations of a split, as texts to try a model on; none for an empty split."""
        chosen = self.conversations(split)[:_TEXTS] if split in self._packs else []
        return [Document(id=one.id, source=one.source, text=one.text) for one in chosen]

    def loader(self, split: str, *, rows: int, seed: int, rank: int = 0, world_size: int = 1) -> Loader:
        """Endless shuffled batches of `rows` rows in all. Raises DataError for an empty split."""
        return Loader([self._pack(split)], rows=rows, seed=seed, fingerprint=f"{self.fingerprint}-{split}", rank=rank,
                      world_size=world_size, name=lambda number: self.conversation(number).id)

    def batches(self, split: str, *, rows: int) -> Iterator[Batch]:
        """Every row of the split once, in order."""
        return batches_in_order([self._pack(split)], rows)

    def look(self, *, split: str, documents: int, tokens: int, first: int = 0) -> dict[str, Any]:
        """What `data.inspect` shows: conversations as the template spells them, with the weight of each token."""
        from dougong.data.inspect import pieces_of

        numbers = self._packs[split].numbers[first:first + documents] if split in self._packs else []
        shown = []
        for number in map(int, numbers):
            one, (ids, weight) = self.conversation(number), self.encoded(number)
            pieces = [{**piece, "weight": float(value)}
                      for piece, value in zip(pieces_of(self.tokenizer, ids[:tokens]), weight)]
            size = int(self._bytes[number])
            shown.append({"id": one.id, "source": one.source, "skill": one.skill, "bytes": size, "tokens": len(ids),
                          "bytes_per_token": size / len(ids), "weight": float(weight.sum()), "pieces": pieces})
        return {"split": split, "documents": shown, "rows": [], "facts": self.facts}

    def _pack(self, split: str) -> "ChatPack":
        if split not in self._packs:
            raise DataError(f"the split {split!r} has no conversations. "
                            f"Splits with some: {', '.join(self._packs)}. data.fractions divides them.")
        return self._packs[split]

    def _gather_facts(self, pack: bool) -> dict[str, Any]:
        splits = {split: self._split_facts(split) for split in SPLITS}
        totals = {name: sum(facts[name] for facts in splits.values())
                  for name in ("documents", "bytes", "tokens", "trained_tokens")}
        known = {name: value for name, value in self._known.items() if name != "format"}
        return {"kind": "chats", **known, "cut": sum(known["cut"].values()), "context": self.context, **totals,
                "splits": splits,
                "packing": {"method": "best_fit" if pack else "one in a row",
                            "reason": "conversations do not see each other" if pack else "data.pack=false"},
                "tokenizer": self.tokenizer.facts()}

    def _split_facts(self, split: str) -> dict[str, Any]:
        pack = self._packs.get(split)
        if pack is None:
            return {**_per_token({"documents": 0, "bytes": 0, "tokens": 0, "trained_tokens": 0}), "rows": 0,
                    "sources": {}, "packing": {"rows": 0, "documents_cut": 0, "padding_share": 0.0}}
        tokens = self.length(pack.numbers) + 1
        size, trained = self._bytes[pack.numbers], self._trained[pack.numbers]
        sources = {}
        for number, source in enumerate(self._known["sources"]):
            mine = self._source[pack.numbers] == number
            if mine.any():
                sources[source["name"]] = _per_token({
                    "documents": int(mine.sum()), "bytes": int(size[mine].sum()),
                    "tokens": int(tokens[mine].sum()), "trained_tokens": int(trained[mine].sum())})
        totals = {"documents": len(tokens), "bytes": int(size.sum()),
                  "tokens": int(tokens.sum()), "trained_tokens": int(trained.sum())}
        filled = int((tokens - 1).sum())
        return {**_per_token(totals), "rows": pack.rows, "sources": sources,
                "packing": {"rows": pack.rows, "documents_cut": self._known["cut"][split],
                            "padding_share": 1 - filled / (pack.rows * pack.context)}}


class ChatPack:
    """Rows of whole conversations, as `data.loader` reads them; `numbers` are those of a split."""

    def __init__(self, corpus: ChatCorpus, numbers: np.ndarray, context: int, pack: bool) -> None:
        self.corpus, self.numbers = corpus, numbers
        lengths = corpus.length(numbers)
        self.method = "best_fit" if pack else "one in a row"
        self.context = context if pack else int(lengths.max())
        row_of = best_fit(lengths, context) if pack else np.arange(len(numbers))
        self._order = numbers[np.argsort(row_of, kind="stable")]
        self._borders = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
        self.rows = len(self._borders) - 1

    def fields(self, rows: np.ndarray, phase: int = 0) -> Fields:
        """`tokens`, `targets` (B T, int64), `weight` (B T, float32), `segment` (B T, int64: the conversation's place in
        its row, one more for what is left empty)."""
        shape = (len(rows), self.context)
        tokens, weight = np.full(shape, self.corpus.tokenizer.document_id or 0, np.int64), np.zeros(shape, np.float32)
        targets, segment = tokens.copy(), np.zeros(shape, np.int64)
        for at, row in enumerate(rows):
            column, place = 0, -1
            for place, number in enumerate(self.documents(int(row))):
                ids, weights = self.corpus.encoded(number)
                here = slice(column, column + len(ids) - 1)
                tokens[at, here], targets[at, here], weight[at, here] = ids[:-1], ids[1:], weights[1:]
                segment[at, here] = place
                column = here.stop
            segment[at, column:] = place + 1
        return {"tokens": tokens, "targets": targets, "weight": weight, "segment": segment}

    def documents(self, row: int, phase: int = 0) -> list[int]:
        """Numbers of the conversations in a row."""
        return self._order[self._borders[row]:self._borders[row + 1]].tolist()


class _Conversations(Sequence[Conversation]):
    def __init__(self, corpus: ChatCorpus, numbers: np.ndarray) -> None:
        self._corpus, self._numbers = corpus, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self._corpus.conversation(int(number)) for number in self._numbers[i]]
        return self._corpus.conversation(int(self._numbers[i]))


def _per_token(facts: dict[str, Any]) -> dict[str, Any]:
    return {**facts, "bytes_per_token": facts["bytes"] / facts["tokens"] if facts["tokens"] else 0.0}
