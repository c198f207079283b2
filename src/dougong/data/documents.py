"""Documents on disk: one text file, an index sorted by split, and facts.json, which makes the store valid."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dougong.core.errors import DataError
from dougong.data.split import ROW, SPLITS

FORMAT = 1
TEXT, NAMES, INDEX, FACTS = "text.bin", "names.bin", "index.bin", "facts.json"


@dataclass(frozen=True, slots=True)
class Document:
    """One text; `id` names its place within the source named `source`: `a/b.txt`, `c.jsonl:7`."""

    id: str
    source: str
    text: str


class DocumentStore:
    """The documents of a corpus with their split, read from disk one at a time.

    `text.bin` holds every document that was read, as UTF-8, in order; `index.bin` the byte ranges of those
    that were kept, training first, then validation, then test, each in the order of the sources. (Removed
    duplicates stay in `text.bin` without an entry: leaving them costs disk, rewriting would cost a second
    pass.) Can be pickled.
    """

    def __init__(self, directory: Path, facts: dict[str, Any]) -> None:
        self.directory, self.facts = directory, facts
        self.sources: list[str] = [source["name"] for source in facts["sources"]]
        self._text = _mapped(directory / TEXT, np.dtype(np.uint8))
        self._names = _mapped(directory / NAMES, np.dtype(np.uint8))
        self._index = _mapped(directory / INDEX, ROW)

    @classmethod
    def open(cls, directory: Path | str) -> "DocumentStore":
        """Raises DataError where the directory holds no store, or one that is unfinished or was changed."""
        directory = Path(directory)
        facts = read_facts(directory)
        if facts is None:
            raise DataError(f"{directory} holds no finished document store.\n"
                            "Prepare it again: dougong data prepare RECIPE")
        for name, file in facts["files"].items():
            size = (directory / name).stat().st_size if (directory / name).is_file() else 0
            if size != file["bytes"]:
                raise DataError(f"{directory / name} has {size} bytes where {file['bytes']} were written.\n"
                                f"Remove {directory} and prepare it again: dougong data prepare RECIPE")
        return cls(directory, facts)

    def __reduce__(self) -> tuple:
        return DocumentStore.open, (self.directory,)

    @property
    def fingerprint(self) -> str:
        """Changes whenever a kept text, its order, its source or its split does."""
        return self.facts["fingerprint"]

    def split(self, name: str) -> "DocumentView":
        return DocumentView(self, name)

    def document(self, row: Any) -> Document:
        text = self._text[row["start"]:row["stop"]].tobytes().decode()
        name = self._names[row["name_start"]:row["name_stop"]].tobytes().decode()
        return Document(id=name, source=self.sources[row["source"]], text=text)

    def rows(self, split: str) -> np.ndarray:
        """The index (ROW, on disk) of one split."""
        before = 0
        for name in SPLITS:
            count = self.facts["splits"][name]["documents"]
            if name == split:
                return self._index[before:before + count]
            before += count
        raise DataError(f"no split {split!r}. Known: {', '.join(SPLITS)}.")


class DocumentView(Sequence[Document]):
    """The documents of one split; `view[i]` reads one from disk."""

    def __init__(self, store: DocumentStore, split: str) -> None:
        self.store, self.name = store, split
        self.rows = store.rows(split)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self.store.document(row) for row in self.rows[i]]
        return self.store.document(self.rows[i])

    def __iter__(self) -> Iterator[Document]:
        return (self.store.document(row) for row in self.rows)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all its documents."""
        return self.store.facts["splits"][self.name]["bytes"]

    @property
    def sources(self) -> list[str]:
        """The names of the sources, in the order that `source_ids` counts."""
        return self.store.sources

    @property
    def source_ids(self) -> np.ndarray:
        """The source (int32) of each document."""
        return self.rows["source"]

    @property
    def sizes(self) -> np.ndarray:
        """The UTF-8 bytes (int64) of each document."""
        return self.rows["stop"] - self.rows["start"]

    def __reduce__(self) -> tuple:
        return DocumentView, (self.store, self.name)


def read_facts(directory: Path) -> dict[str, Any] | None:
    """The facts of a finished store of this format, or None."""
    try:
        facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and facts.get("format") == FORMAT else None


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.stat().st_size:   # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r").view(np.ndarray)
