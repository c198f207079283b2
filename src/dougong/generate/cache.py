"""Keys and values of the tokens already read, so that a new token costs one position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GROWTH = 128   # least number of new slots when a layer's store is full; beyond it the store grows by half


@dataclass(frozen=True)
class Columns:
    """Where a cache keeps rows that end together, with room for another token of each: stores by layer (at least these
    rows, K, width, H), the first column of each row, and the column that is next."""

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    begins: Sequence[int]
    end: int

    @property
    def width(self) -> int:
        """Columns there are."""
        return next(iter(self.keys.values())).shape[2]


class KVCache:
    """One growing store of keys and values per layer, for a batch whose rows may be left-padded.

    A layer's store is (B K capacity H) and `update` returns its filled part as a view. Slicing costs nothing,
    while a store of fixed size needs a mask and makes every step read slots that hold nothing. `start_B` is
    the index of each row's first real token, or None where no row is padded.
    """

    def __init__(self, *, start_B: Int[Tensor, "B"] | None = None, reserve: int = 0) -> None:
        """`reserve` slots are allocated at the first update, for a text whose final length is known."""
        self.length = 0
        self.start_B = start_B if start_B is not None and bool((start_B > 0).any()) else None
        self._reserve = reserve
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def update(self, layer: int, k_BKTH: Float[Tensor, "B K T H"], v_BKTH: Float[Tensor, "B K T H"],
               ) -> tuple[Float[Tensor, "B K S H"], Float[Tensor, "B K S H"]]:
        """Stores T new positions of one layer; returns all S = length + T keys and values of that layer."""
        length, end = self.length, self.length + k_BKTH.shape[2]
        keys = self._keys.get(layer)
        if keys is None or end > keys.shape[2]:
            self._grow(layer, end, k_BKTH, v_BKTH)
        keys, values = self._keys[layer], self._values[layer]
        keys.narrow(2, length, end - length).copy_(k_BKTH)
        values.narrow(2, length, end - length).copy_(v_BKTH)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def advance(self, T: int) -> None:
        """Counts T positions as read. The model calls it once, after its last layer."""
        self.length += T

    def columns(self) -> list[Columns]:
        """Where the rows are; none where nothing has been read yet."""
        first = next(iter(self._keys.values()), None)
        if first is None:
            return []
        if self.length + 1 > first.shape[2]:
            for layer in self._keys:
                self._grow(layer, self.length + 1, self._keys[layer], self._values[layer])
        begins = [0] * len(first) if self.start_B is None else self.start_B.tolist()
        return [Columns(self._keys, self._values, begins, self.length)]

    def keep(self, rows: list[int]) -> None:
        """Keeps these rows, in this order; a row may be named several times (samples of one prompt).

        Columns that are padding in every remaining row are dropped with them.
        """
        drop = 0
        if self.start_B is not None:
            start_B = self.start_B[torch.tensor(rows, device=self.start_B.device)]
            drop = int(start_B.min())
            start_B = start_B - drop
            self.start_B = start_B if bool((start_B > 0).any()) else None
        self._reserve = max(self._reserve - drop, 0)
        for store in (self._keys, self._values):
            for layer, held in store.items():
                index = torch.tensor(rows, device=held.device)
                new = held.new_zeros(len(rows), held.shape[1], held.shape[2] - drop, held.shape[3])
                new[:, :, :self.length - drop] = held[:, :, drop:self.length].index_select(0, index)
                store[layer] = new
        self.length -= drop

    @property
    def nbytes(self) -> int:
        """Bytes held, unused slots included."""
        return sum(t.numel() * t.element_size() for s in (self._keys, self._values) for t in s.values())

    def _grow(self, layer: int, end: int, k_BKTH: Tensor, v_BKTH: Tensor) -> None:
        capacity = max(self._reserve, end + max(_GROWTH, end // 2) if self.length else end)
        for store, new in ((self._keys, k_BKTH), (self._values, v_BKTH)):
            B, K, _, H = new.shape
            larger = new.new_zeros(B, K, capacity, H)   # attention may multiply unused columns by 0: `fused`
            if layer in store:
                larger[:, :, :self.length] = store[layer][:, :, :self.length]
            store[layer] = larger
