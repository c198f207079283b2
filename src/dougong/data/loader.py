"""Endless batches in one global order, decided by the seed and the data alone, restored anywhere in O(1).

Global batch g holds rows g·rows … (g+1)·rows-1 of the sequence, and rank r of w reads its w-th of them: a run
stopped on 8 ranks goes on with 2 and sees the same samples. Batch g is a pure function of g, so prefetching
in a background thread changes nothing, and the state is g.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from dougong.core.errors import CheckpointError, ConfigError
from dougong.data.batch import Batch
from dougong.data.mix import Mixture
from dougong.runtime.seeds import derive

_AHEAD = 2


class Pack(Protocol):
    """Rows of one part of the data: `Windows` or `BestFit`."""

    method: str
    context: int
    rows: int

    def fields(self, rows: np.ndarray, phase: int) -> dict[str, np.ndarray]: ...

    def documents(self, row: int, phase: int) -> list[int]: ...


class Loader(Iterator[Batch]):
    """Yields batches for ever; `epoch` and `position` say how far it is. `position` counts batches given out.

    `shares`: how much of the sequence each pack gets (None: in proportion to its rows, so an epoch is every
    row once). `name` says what the n-th document is called. Raises ConfigError when `rows` cannot be divided between
    the ranks.
    """

    def __init__(self, packs: Sequence[Pack], *, rows: int, seed: int, fingerprint: str,
                 shares: Sequence[float] | None = None, rank: int = 0, world_size: int = 1,
                 name: Callable[[int], str] = str) -> None:
        if rows < 1 or rows % world_size:
            raise ConfigError(f"a batch of {rows} rows cannot be shared by {world_size} processes equally.\n"
                              f"Try a batch of {max(1, round(rows / world_size)) * world_size} rows.")
        self._packs, self._rows, self._seed, self._fingerprint = list(packs), rows, seed, fingerprint
        self._mine = np.arange(rows // world_size) + rank * (rows // world_size)
        sizes = [pack.rows for pack in packs]
        self.mixture = Mixture(sizes, list(shares or sizes), seed)
        self.position, self._name = 0, name
        self._ready: deque[Future[Batch]] = deque()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="loader")

    @property
    def epoch(self) -> int:
        """Whole epochs given out; with shares, as many rows as the data has count as one."""
        return self.position * self._rows // self.mixture.rows_per_epoch

    @property
    def batches_per_epoch(self) -> int:
        """Batches that begin within an epoch; the last may run into the next epoch's first rows."""
        return -(-self.mixture.rows_per_epoch // self._rows)

    def __next__(self) -> Batch:
        while len(self._ready) <= _AHEAD:
            self._ready.append(self._worker.submit(self.batch, self.position + len(self._ready)))
        batch = self._ready.popleft().result()
        self.position += 1
        return batch

    def batch(self, number: int) -> Batch:
        """This rank's rows of global batch `number`; does not move the loader."""
        parts = []
        for place in self.mixture.at(number * self._rows + self._mine):
            pack = self._packs[place.part]
            phase = derive(self._seed, "phase", place.part, place.epoch) % pack.context
            parts.append((place.slots, pack.fields(place.rows, phase)))
        return Batch(**_together(parts, len(self._mine)))

    def documents(self, number: int) -> list[list[str]]:
        """The documents that each of this rank's rows of batch `number` shows."""
        named: list[list[str]] = [[] for _ in self._mine]
        for place in self.mixture.at(number * self._rows + self._mine):
            pack = self._packs[place.part]
            phase = derive(self._seed, "phase", place.part, place.epoch) % pack.context
            for slot, row in zip(place.slots.tolist(), place.rows.tolist()):
                named[slot] = [self._name(document) for document in pack.documents(row, phase)]
        return named

    @property
    def number(self) -> int:
        """The number of the batch that comes next."""
        return self.position

    def seek(self, number: int) -> None:
        """Goes on with batch `number`."""
        for future in self._ready:
            future.cancel()
        self._ready.clear()
        self.position = number

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, and what makes its order: plain JSON values."""
        return {"position": self.position, "data": self._fingerprint, **self._order()}

    def _order(self) -> dict[str, Any]:
        return {"rows": self._rows, "seed": self._seed, "context": [pack.context for pack in self._packs],
                "packing": [pack.method for pack in self._packs], "sizes": self.mixture.sizes,
                "shares": [round(share, 9) for share in self.mixture.shares]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken. Raises CheckpointError when the sequence there was another one."""
        if state["data"] != self._fingerprint:
            raise CheckpointError(
                f"the checkpoint was made with other data (fingerprint {state['data'][:16]}…) than this "
                f"(fingerprint {self._fingerprint[:16]}…): files, split or tokenizer have changed.\n"
                "Put the data back as it was, or start a new run from the checkpoint's weights."
            )
        for name, value in self._order().items():
            if state[name] != value:
                raise CheckpointError(
                    f"the checkpoint's batches were made with {name}={state[name]}, now it is {value}: "
                    f"the place in the data would mean something else.\n"
                    f"Set {name} back to {state[name]}, or start a new run from the checkpoint's weights."
                )
        self.seek(int(state["position"]))

    def close(self) -> None:
        """Stops the background thread; the loader is of no use after it."""
        self._worker.shutdown(cancel_futures=True)


def batches_in_order(packs: Sequence[Pack], rows: int) -> Iterator[Batch]:
    """Every row of every pack once, in order, at phase 0; the last batch of a pack may be smaller."""
    for pack in packs:
        for start in range(0, pack.rows, rows):
            fields = pack.fields(np.arange(start, min(start + rows, pack.rows)), 0)
            yield Batch(
                **{name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in fields.items()}
            )


def _together(parts: list[tuple[np.ndarray, dict[str, np.ndarray]]], rows: int) -> dict[str, torch.Tensor]:
    """Fields of several parts, each row put in its slot; a part without `segment` has one segment."""
    if len(parts) == 1:
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in parts[0][1].items()}
    fields: dict[str, np.ndarray] = {}
    for slots, values in parts:
        for name, value in values.items():
            fields.setdefault(name, np.zeros((rows, *value.shape[1:]), value.dtype))[slots] = value
    return {name: torch.from_numpy(value) for name, value in fields.items()}
