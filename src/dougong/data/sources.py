"""Where documents come from: files, JSON lines, Parquet, Hugging Face datasets, the Python installation."""

import fnmatch
import os
import platform
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from dougong.core.config import config
from dougong.core.errors import DataError, MissingExtraError
from dougong.data.decode import COMPRESSED, NotText, bare_suffix, check_encoding, read_text
from dougong.data.documents import Document
from dougong.data.records import JSON_LINES, read_json_lines, read_parquet, texts
from dougong.data.walk import Skipped, find, walk


@config
class Source(ABC):
    """What every source has. `documents` streams in an order that does not depend on the file system."""

    # described in Field, not below it: the schema does not inherit attribute docstrings
    kind: str
    name: str | None = Field(default=None, description="what reports call it; None: the last part of its path")
    weight: float = Field(default=1.0, gt=0, description="how often it is drawn from, relative to the other sources")

    @property
    @abstractmethod
    def label(self) -> str:
        """The name in reports."""

    @abstractmethod
    def documents(self, skipped: Skipped) -> Iterator[Document]:
        """Streams them; counts in `skipped` what is none. Raises DataError where nothing is there."""

    @abstractmethod
    def inventory(self) -> Iterator[tuple[str, int, int]]:
        """Yields (name, bytes, time of change in ns) of what would be read, without reading it."""

    def total_bytes(self) -> int | None:
        """About how many bytes `documents` will yield; None where only reading tells."""
        total = 0
        for name, size, _ in self.inventory():
            if name.lower().endswith((*COMPRESSED, *JSON_LINES, ".parquet")):
                return None
            total += size
        return total

    def about(self) -> dict[str, Any]:
        """Facts for the report that the documents do not show."""
        return {}


@config
class _PathSource(Source):
    """A source that reads the files at a path."""

    path: str = Field(description="a folder, a file or a glob")

    @property
    def label(self) -> str:
        return self.name or Path(self.path).expanduser().name or Path(self.path).absolute().name or "files"

    def inventory(self) -> Iterator[tuple[str, int, int]]:
        for name, path in find(self.path, Skipped()):
            status = path.stat()
            yield name, status.st_size, status.st_mtime_ns

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        for name, path in find(self.path, skipped):
            try:
                for part, text in self._read(path, name, skipped):
                    if text.strip():
                        yield Document(id=part, source=self.label, text=text)
                    else:
                        skipped.add("empty", part)
            except NotText as problem:
                skipped.add(problem.reason, name, problem.where)
            except OSError as error:
                skipped.add("unreadable file", name, error.strerror or str(error))

    @abstractmethod
    def _read(self, path: Path, name: str, skipped: Skipped) -> Iterator[tuple[str, str]]:
        """Yields (document id, text)."""


@config
class FilesSource(_PathSource):
    """Text or code of any language: one file is one document (one of over 16 MiB several, cut at a line's
    end).

    Inside a folder .jsonl and .parquet are read record by record (field `text`), and .gz, .xz and .zst of all
    of these are decompressed (.parquet and .zst need the extra `data`). Byte-order marks and, in .py files,
    coding lines (PEP 263) win over `encoding`. Binary and undecodable files, hidden ones, those that look like
    secrets and folders of installed packages are skipped.
    """

    kind: Literal["files"] = "files"
    encoding: str | None = None
    """of files that do not say themselves, such as gb18030; None: UTF-8"""

    @field_validator("encoding")
    @classmethod
    def _known(cls, encoding: str | None) -> str | None:
        return check_encoding(encoding) if encoding else None

    def _read(self, path: Path, name: str, skipped: Skipped) -> Iterator[tuple[str, str]]:
        suffix = bare_suffix(name)
        if suffix in JSON_LINES:
            yield from texts(read_json_lines(path, name, skipped, encoding=self.encoding), ["text"], skipped)
        elif suffix == ".parquet":
            yield from texts(read_parquet(path, name, ["text"]), ["text"], skipped)
        else:
            for number, text in enumerate(read_text(path, encoding=self.encoding)):
                yield (f"{name}#{number + 1}" if number else name), text


@config
class JsonlSource(_PathSource):
    """JSON lines (.jsonl, also .gz, .xz, .zst): one object a line, one object a document."""

    kind: Literal["jsonl"] = "jsonl"
    fields: tuple[str, ...] = Field(default=("text",), min_length=1)
    """the fields that make up the text, in order"""

    def _read(self, path: Path, name: str, skipped: Skipped) -> Iterator[tuple[str, str]]:
        if Path(self.path).expanduser().is_dir() and bare_suffix(name) not in JSON_LINES:
            raise NotText("not a .jsonl file")
        return texts(read_json_lines(path, name, skipped), self.fields, skipped)


@config
class ParquetSource(_PathSource):
    """Parquet files (extra `data`): one row is one document."""

    kind: Literal["parquet"] = "parquet"
    fields: tuple[str, ...] = Field(default=("text",), min_length=1)
    """the columns that make up the text, in order"""

    def _read(self, path: Path, name: str, skipped: Skipped) -> Iterator[tuple[str, str]]:
        if Path(self.path).expanduser().is_dir() and bare_suffix(name) != ".parquet":
            raise NotText("not a .parquet file")
        return texts(read_parquet(path, name, self.fields), self.fields, skipped)


@config
class HuggingFaceSource(Source):
    """A dataset of the Hugging Face hub or a local one (extra `hf`), streamed, not downloaded whole."""

    kind: Literal["hf"] = "hf"
    dataset: str
    """a name such as wikimedia/wikipedia, or a folder (of data files, or one that `save_to_disk` wrote)"""
    subset: str | None = None
    """the dataset's configuration, such as 20231101.zh"""
    split: str = "train"
    """the dataset's own split to read; dougong makes its own split of it"""
    revision: str | None = None
    """the commit or tag to hold still; a hub's dataset without one may change between preparations"""
    fields: tuple[str, ...] = Field(default=("text",), min_length=1)
    """the columns that make up the text, in order"""
    limit: int | None = Field(default=None, gt=0)
    """stop after so many records; None: all"""

    @property
    def label(self) -> str:
        return self.name or Path(self.dataset).name

    def inventory(self) -> Iterator[tuple[str, int, int]]:
        folder = Path(self.dataset).expanduser()
        if folder.is_dir():
            for name, path in walk(folder, Skipped()):
                yield name, path.stat().st_size, path.stat().st_mtime_ns

    def total_bytes(self) -> int | None:
        return None

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        records = (r for r, _ in zip(enumerate(self.open()), range(self.limit or sys.maxsize)))
        named = ((f"{self.split}:{number}", record) for number, record in records)
        for name, text in texts(named, self.fields, skipped):
            if text.strip():
                yield Document(id=name, source=self.label, text=text)
            else:
                skipped.add("empty", name)

    def open(self) -> Any:
        """The records, one dict each. Raises DataError where the data set cannot be opened."""
        try:
            import datasets
        except ImportError:
            raise MissingExtraError("datasets", "hf", f"reading the dataset {self.dataset!r}") from None
        folder = Path(self.dataset).expanduser()
        try:
            if any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
                saved = datasets.load_from_disk(str(folder))
                return saved[self.split] if isinstance(saved, datasets.DatasetDict) else saved
            return datasets.load_dataset(str(folder) if folder.is_dir() else self.dataset, self.subset,
                                         split=self.split, revision=self.revision, streaming=True)
        except Exception as error:  # the library raises many kinds, from KeyError to HTTP errors
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(f"the dataset {self.dataset!r} (subset {self.subset}, split {self.split!r}) "
                            f"cannot be opened: {reason}\n"
                            "Check the name, the subset and the split; a hub's dataset needs the network "
                            "(or a copy that was downloaded before), a gated one `hf auth login`. Without "
                            "it give dataset= a local folder, or use the source kind=files.") from error


_REFERENCE = "pydoc_data/topics.py"   # the language reference as one module; read topic by topic
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})


@config
class PythonSource(Source):
    """The Python installation itself: real, permissively licensed text that every user of dougong already
    has.

    Reads the standard library's .py files (each one document), its .rst and .txt files, and the language
    reference of `pydoc` (each topic one document). Tests are read where the distribution ships them
    (CPython's own builds do, Debian's do not): they are half of the text, written by hand, and little more
    repetitive than the library (xz -9 shrinks CPython 3.11's 7.2 times, asyncio 5.9 times); `tests=False`
    leaves them out, test data always stays out. Skipped too: installed packages, and the character tables
    that a script generated (`encodings/cp*.py` …; 25 times), which would teach a model nothing but numbers.
    """

    kind: Literal["python"] = "python"
    tests: bool = True
    """read the standard library's tests where they are installed"""
    exclude: tuple[str, ...] = ()
    """patterns over the names of files left out, such as json/*; `data.python_questions.held_out_modules()` gives those
    about which questions are held out"""

    @property
    def label(self) -> str:
        return self.name or "python"

    def root(self) -> Path:
        """The standard library's folder. Raises DataError where it is zipped or stripped of its sources."""
        root = Path(sysconfig.get_path("stdlib"))
        if not (root / "os.py").is_file():
            where = getattr(os, "__file__", None) or "no file"
            raise DataError(f"this Python ({sys.executable}) has no readable standard library at {root}: its "
                            f"modules are loaded from {where}, as in zipped or embedded distributions.\n"
                            "Use a Python from python.org, Debian, pyenv or conda, or give your own texts: "
                            "data.path=FOLDER")
        return root

    def files(self, skipped: Skipped) -> Iterator[tuple[str, Path]]:
        """(name, path) of what is read, in order of their names."""
        for name, path in walk(self.root(), skipped):
            folders = set(name.split("/")[:-1])
            is_test = not folders.isdisjoint(_TEST_FOLDERS)
            if path.suffix not in (".py", ".rst", ".txt"):
                skipped.add("not source or documentation", name)
            elif is_test and (not self.tests or "data" in folders or path.suffix != ".py"):
                skipped.add("test data" if self.tests else "test", name)
            elif any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude):
                skipped.add("excluded", name)
            elif _is_generated(path):
                skipped.add("generated table", name)
            else:
                yield name, path

    def inventory(self) -> Iterator[tuple[str, int, int]]:
        for name, path in self.files(Skipped()):
            yield name, path.stat().st_size, path.stat().st_mtime_ns

    def documents(self, skipped: Skipped) -> Iterator[Document]:
        for name, path in self.files(skipped):
            try:
                parts = _topics() if name == _REFERENCE else ((name, text) for text in read_text(path))
                for part, text in parts:
                    if text.strip():
                        yield Document(id=part, source=self.label, text=text)
            except NotText as problem:
                skipped.add(problem.reason, name, problem.where)
            except OSError as error:
                skipped.add("unreadable file", name, error.strerror or str(error))

    def about(self) -> dict[str, Any]:
        return {"python": platform.python_version(), "implementation": platform.python_implementation(),
                "tests": self.tests and (self.root() / "test").is_dir()}


def _is_generated(path: Path) -> bool:
    if path.parent.name != "encodings":
        return path.name.startswith("_sysconfigdata")
    with open(path, "rb") as file:
        return b"generated from" in file.read(400)


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield f"{_REFERENCE}#{topic}", topics[topic]
