"""Processes that read or write one checkpoint together: what one finds, all know, and an error of one is all's."""

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from dougong.core.errors import CheckpointError, DougongError
from dougong.runtime.mesh import Mesh

T = TypeVar("T")
_SLOWEST_WRITER_S = 900
"""how long the first to have written its files waits for the last, before it takes it for lost"""


class Peers:
    """A process group and this process's place in it; without a group, one process by itself.

    The values exchanged are our own, between live processes; nothing here is read from a file.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def of(cls, mesh: Mesh | None) -> "Peers":
        """All processes of a mesh, in their default group: for the main thread, between steps."""
        return cls(None if mesh is None or mesh.devices is None else dist.group.WORLD)

    @classmethod
    def apart(cls, mesh: Mesh | None) -> "Peers":
        """The same processes in a gloo group of their own, for a background thread: in the default group its messages
        would get between those of the step. Every process calls this alike."""
        if mesh is None or mesh.devices is None:
            return cls()
        return cls(dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=_SLOWEST_WRITER_S)))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def everyone(self, value: T) -> list[T]:
        """What each process brings, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, work: Callable[[], T]) -> T:
        """Process 0 does `work`; its result, or its error, is everybody's."""
        return self.together(work if self.first else lambda: None)[0]  # type: ignore[return-value]

    def to_first(self, value: T) -> list[T] | None:
        """What each process brings, by rank, on process 0; None on the others."""
        if self.group is None:
            return [value]
        values: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(value, values, dst=dist.get_global_rank(self.group, 0), group=self.group)
        return values

    def to_each(self, values: list[T] | None) -> T:
        """Process 0's list, one item for each process."""
        if self.group is None:
            assert values is not None
            return values[0]
        box: list[Any] = [None]
        dist.scatter_object_list(box, values, src=dist.get_global_rank(self.group, 0), group=self.group)
        return box[0]

    def together(self, work: Callable[[], T]) -> list[T]:
        """Every process does `work`; all get all results, or all raise the error of the first that failed.

        A lone process raises its error as it is. Raises CheckpointError for anything else that goes wrong elsewhere.
        """
        if self.group is None:
            return [work()]
        result: Any = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:     # told to the others before it is raised, or they would wait for ever
            error = caught
        answers = self.everyone((result, None if error is None else _told(error)))
        failed = [(rank, told) for rank, (_, told) in enumerate(answers) if told is not None]
        if failed:
            rank, (kind, text) = failed[0]
            raise kind(f"process {rank} of {self.size}: {text}") from error
        return [answer for answer, _ in answers]


def _told(error: Exception) -> tuple[type[DougongError], str]:
    """An error as it can be raised by others: the user's with its own class and words, any other with its name."""
    if isinstance(error, DougongError):
        kind = next(c for c in (CheckpointError, DougongError) if isinstance(error, c))
        return kind, str(error)
    return CheckpointError, f"{type(error).__name__}: {error}"
