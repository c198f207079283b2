"""Where conversations come from: files, data sets of Hugging Face, and what dougong makes itself."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dougong.core.config import config
from dougong.core.table import Table
from dougong.data.conversations import Conversation, conversations_in
from dougong.data.decode import NotText
from dougong.data.records import read_records
from dougong.data.sources import HuggingFaceSource
from dougong.data.walk import Skipped, find

CHAT_SOURCES = Table("source of conversations", {
    "files": "dougong.data.chat_sources:ChatFiles",
    "hf": "dougong.data.chat_sources:ChatDataset",
    "python_questions": "dougong.data.python_questions:PythonQuestions",
    "tasks": "dougong.data.tasks:Tasks",
})


class Found(Skipped):
    """What was skipped, and how many conversations of each shape each file held."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, dict[str, int]] = {}


@config
class ChatSource(ABC):
    """What every source of conversations has; they come in an order that does not depend on the file system."""

    kind: str
    name: str | None = Field(default=None, description="what reports call it; None: the last part of its path")
    limit: int | None = Field(default=None, gt=0, description="stop after so many conversations; None: all")

    @property
    def label(self) -> str:
        """The name in reports."""
        return self.name or self.kind

    @abstractmethod
    def conversations(self, found: Found) -> Iterator[Conversation]:
        """Streams them, before `limit`. Raises DataError where nothing is there."""

    @abstractmethod
    def inventory(self) -> Iterator[tuple[str, int, int]]:
        """Yields (name, bytes, time of change in ns) of what would be read."""

    def about(self) -> dict[str, Any]:
        """What its conversations depend on besides files, as the Python version."""
        return {}

    def stream(self, found: Found) -> Iterator[Conversation]:
        """The conversations up to `limit`."""
        return islice(self.conversations(found), self.limit)


@config
class ChatFiles(ChatSource):
    """JSON lines, JSON lists and Parquet files (compressed too), in any shape of `data.conversations`."""

    kind: Literal["files"] = "files"
    path: str
    """a folder, a file or a glob"""

    @property
    def label(self) -> str:
        return self.name or Path(self.path).expanduser().name or "files"

    def inventory(self) -> Iterator[tuple[str, int, int]]:
        for name, path in find(self.path, Skipped()):
            status = path.stat()
            yield name, status.st_size, status.st_mtime_ns

    def conversations(self, found: Found) -> Iterator[Conversation]:
        for name, path in find(self.path, found):
            try:
                yield from conversations_in(read_records(path, name, found), source=self.label, skipped=found,
                                            shapes=found.shapes.setdefault(name, {}))
            except NotText as problem:
                found.add(problem.reason, name, problem.where)
            except OSError as error:
                found.add("unreadable file", name, error.strerror or str(error))


@config
class ChatDataset(ChatSource):
    """A data set of the Hugging Face hub or a saved one (extra `hf`), streamed."""

    kind: Literal["hf"] = "hf"
    dataset: str
    """a name such as HuggingFaceH4/no_robots, or a folder"""
    subset: str | None = None
    split: str = "train"
    """the data set's own split to read; dougong makes its own split of it"""
    revision: str | None = None
    """the commit or tag to hold still; a hub's data set without one may change between preparations"""

    @property
    def label(self) -> str:
        return self.name or Path(self.dataset).name

    def _source(self) -> HuggingFaceSource:
        return HuggingFaceSource(dataset=self.dataset, subset=self.subset, split=self.split, revision=self.revision)

    def inventory(self) -> Iterator[tuple[str, int, int]]:
        return self._source().inventory()

    def conversations(self, found: Found) -> Iterator[Conversation]:
        records = ((f"{self.split}:{number}", record) for number, record in enumerate(self._source().open()))
        return conversations_in(records, source=self.label, skipped=found,
                                shapes=found.shapes.setdefault(self.label, {}))
