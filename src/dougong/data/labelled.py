"""The data kind `labelled`: texts with one label each, for a model that is to tell them apart."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from dougong.core.config import config
from dougong.core.errors import ConfigError, DataError
from dougong.core.files import default_cache
from dougong.data.batch import Batch
from dougong.data.decode import NotText
from dougong.data.dedup import digest
from dougong.data.documents import Document
from dougong.data.loader import Loader, batches_in_order
from dougong.data.materialise import Progress
from dougong.data.pack import Fields
from dougong.data.prepare import key_of, ready_tokenizer
from dougong.data.records import read_records
from dougong.data.split import SPLITS, by_hash
from dougong.data.tokenizer import Tokenizer
from dougong.data.walk import Skipped, find

_MULTIPLE = 8     # lengths are rounded up to it, so that kernels see few shapes


@config
class LabelledData:
    """Records with a text and a label. Texts longer than a row are cut at its end, and counted. Held in memory."""

    kind: Literal["labelled"] = "labelled"
    path: str | None = None
    """a folder, file or glob of .jsonl, .json or .parquet"""
    text: str = "text"
    """the field of the text"""
    label: str = "label"
    """the field of the label: a word or a whole number"""
    row_tokens: int | None = Field(default=None, ge=1)
    """most tokens of a text that are read; derived: the model's context"""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """of training, validation and test, by a hash of the text"""

    @field_validator("fractions")
    @classmethod
    def _adds_up(cls, fractions: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(fractions) < 0 or fractions[0] == 0 or abs(sum(fractions) - 1) > 1e-9:
            raise ValueError("give three shares that add up to 1, training's above 0: [0.8, 0.1, 0.1]")
        return fractions

    def prepare(self, tokenizer: Any, *, context: int, cache: Path | str | None = None, seed: int = 0,
                progress: Progress | None = None) -> "LabelledCorpus":
        """Reads and tokenises. Raises DataError where there are fewer than two labels to tell apart."""
        if self.path is None:
            raise ConfigError("data.path is not given. Name a .jsonl file with text and label in each line: "
                              "data.path=texts.jsonl")
        texts = _Texts(self)
        report = progress or (lambda done, total, what: None)
        chosen = ready_tokenizer(tokenizer, texts, Path(cache) if cache else default_cache(), seed, report)
        return LabelledCorpus(texts, chosen, context=context, fractions=self.fractions, seed=seed)


class _Texts:
    """The records, and to a tokenizer that learns their texts as documents."""

    def __init__(self, data: LabelledData) -> None:
        self.skipped = Skipped()
        self.label = Path(data.path or "").name
        self.records: list[tuple[str, str]] = []
        for name, path in find(data.path or "", self.skipped):
            try:
                for place, record in read_records(path, name, self.skipped):
                    self._add(record, place, data)
            except NotText as problem:
                self.skipped.add(problem.reason, name, problem.where)
            except OSError as error:
                self.skipped.add("unreadable file", name, error.strerror or str(error))
        self.fingerprint = f"labelled {key_of([self.records])}"

    def _add(self, record: Any, place: str, data: LabelledData) -> None:
        text, label = (record.get(field) if isinstance(record, dict) else None for field in (data.text, data.label))
        if not isinstance(text, str) or not text.strip():
            self.skipped.add("record without a text", place)
        elif not isinstance(label, str | int):
            self.skipped.add("record without a label", place)
        else:
            try:
                f"{text}{label}".encode()
            except UnicodeEncodeError as error:   # JSON can hold half of a surrogate pair
                self.skipped.add("lone surrogate", place, f"character {error.start}")
            else:
                self.records.append((text, str(label)))

    def split(self, _name: str) -> "_Texts":
        return self

    @property
    def bytes(self) -> int:
        return sum(len(text.encode()) for text, _ in self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Document:
        return Document(id=str(i), source=self.label, text=self.records[i][0])

    def __iter__(self) -> Iterator[Document]:
        return (self[i] for i in range(len(self)))


class LabelledCorpus:
    """What `LabelledData.prepare` returns. `labels` are the names of the classes, in the order of their numbers."""

    def __init__(self, texts: _Texts, tokenizer: Tokenizer, *, context: int, fractions: Sequence[float],
                 seed: int) -> None:
        self.tokenizer, self.context = tokenizer, context
        self.labels = sorted({label for _, label in texts.records})
        if len(self.labels) < 2:
            raise DataError(f"{texts.label} has {len(self.labels)} different labels, and two are the least to tell "
                            f"apart. Skipped:\n{texts.skipped}")
        begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
        encoded = tokenizer.encode_batch([text for text, _ in texts.records])
        self.ids = [np.concatenate([np.array(begin, np.int32), ids])[:context] for ids in encoded]
        cut = np.array([len(begin) + len(ids) > context for ids in encoded])
        self.classes = np.array([self.labels.index(label) for _, label in texts.records], np.int64)
        digests = np.frombuffer(b"".join(digest(text) for text, _ in texts.records), "<u8").reshape(-1, 2)
        self._split = by_hash(digests, tuple(fractions), seed)
        content = hashlib.sha256(json.dumps([tokenizer.fingerprint, self.labels, context]).encode())
        for values in (*self.ids, self.classes, self._split):
            content.update(values.tobytes())
        self.fingerprint = content.hexdigest()
        sizes = np.array([len(text.encode()) for text, _ in texts.records], np.int64)
        self.facts = self._gather_facts(texts, sizes, cut)

    def look(self, *, split: str, documents: int, tokens: int, first: int = 0) -> dict[str, Any]:
        """What `data.inspect` shows: texts, each under its label."""
        from dougong.data.inspect import pieces_of

        numbers = np.flatnonzero(self._split == SPLITS.index(split))[first:first + documents]
        shown = []
        for number in map(int, numbers):
            ids = self.ids[number]
            size = len(self.tokenizer.decode_bytes(ids))
            shown.append({"id": f"text {number}", "source": self.labels[self.classes[number]], "bytes": size,
                          "tokens": len(ids), "bytes_per_token": size / len(ids),
                          "pieces": pieces_of(self.tokenizer, ids[:tokens])})
        return {"split": split, "documents": shown, "rows": [], "facts": self.facts}

    def loader(self, split: str, *, rows: int, seed: int, rank: int = 0, world_size: int = 1) -> Loader:
        """Endless shuffled batches of `rows` texts in all. Raises DataError for an empty split."""
        return Loader([self._pack(split)], rows=rows, seed=seed, fingerprint=f"{self.fingerprint}-{split}", rank=rank,
                      world_size=world_size, name=lambda number: f"text {number}")

    def batches(self, split: str, *, rows: int) -> Iterator[Batch]:
        """Every text of the split once, in order."""
        return batches_in_order([self._pack(split)], rows)

    def _pack(self, split: str) -> "_Pack":
        numbers = np.flatnonzero(self._split == SPLITS.index(split))
        if not len(numbers):
            raise DataError(f"the split {split!r} has no texts. data.fractions divides them.")
        return _Pack(self, numbers)

    def _gather_facts(self, texts: _Texts, sizes: np.ndarray, cut: np.ndarray) -> dict[str, Any]:
        lengths = np.array([len(ids) for ids in self.ids])
        splits = {}
        for number, name in enumerate(SPLITS):
            mine = self._split == number
            tokens, held = int(lengths[mine].sum()), int(sizes[mine].sum())
            rows, longest = int(mine.sum()), int(lengths[mine].max(initial=1))
            splits[name] = {"documents": rows, "rows": rows, "bytes": held, "tokens": tokens,
                            "bytes_per_token": held / tokens if tokens else 0.0, "sources": {},
                            "packing": {"rows": rows, "documents_cut": int(cut[mine].sum()),
                                        "padding_share": 1 - tokens / (rows * longest) if rows else 0.0}}
        counts = np.bincount(self.classes, minlength=len(self.labels)).tolist()
        return {"kind": "labelled", "fingerprint": self.fingerprint, "context": self.context, "splits": splits,
                "labels": dict(zip(self.labels, counts)), "cut": int(cut.sum()), "skipped": texts.skipped.facts(),
                "duplicates": {}, "sources": [{"name": texts.label, "kind": "labelled"}],
                "packing": {"method": "one in a row", "reason": "each text is judged by itself"},
                "split": {"rule": "texts", "sentence": "Split by a hash of the text."},
                "tokenizer": self.tokenizer.facts()}


class _Pack:
    """Some texts of a corpus, as `data.loader` reads them."""

    method = "one in a row"

    def __init__(self, corpus: LabelledCorpus, numbers: np.ndarray) -> None:
        self.corpus, self.numbers, self.rows, self.context = corpus, numbers, len(numbers), corpus.context

    def fields(self, rows: np.ndarray, phase: int = 0) -> Fields:
        """`tokens` (B T, int64), `places` (B: where each text ends) and `labels` (B, int64)."""
        numbers = self.numbers[rows]
        texts = [self.corpus.ids[number] for number in numbers]
        width = -(-max(map(len, texts)) // _MULTIPLE) * _MULTIPLE
        tokens = np.zeros((len(rows), min(width, self.context)), np.int64)
        for row, ids in zip(tokens, texts):
            row[:len(ids)] = ids
        return {"tokens": tokens, "places": np.array([len(ids) - 1 for ids in texts], np.int64),
                "labels": self.corpus.classes[numbers]}

    def documents(self, row: int, phase: int = 0) -> list[int]:
        return [int(self.numbers[row])]
