"""Keys and values of rows that come and go: rows of similar length side by side, aligned at their ends.

A step of a batch reads every row's keys as one slice of memory, as `KVCache` does; a cache of pages would have to be
gathered at each step, which on a CPU costs as much as attention itself (docs/design/serving.md). Rows end in the same
column, so a new token of each is written in one copy and a row that joins, leaves or moves touches no other row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dougong.generate.cache import Columns

BLOCK = 64     # tokens: the unit of widths, of the budget and of shared prefixes
_ROOM = 32     # columns a row finds free when it enters a lane
_SHIFT = 16    # columns that a shift frees at least, so that it is rare


def width_for(length: int, at_most: int | None = None) -> int:
    """Columns of the lane for a row of this length: 2, 3, 4, 6, 8, 12, … blocks, so at most a third is unused."""
    blocks, power = -(-(length + _ROOM) // BLOCK), 2
    while blocks > power * 3 // 2:
        power *= 2
    width = BLOCK * (power if blocks <= power else power * 3 // 2)
    return width if at_most is None else max(min(width, at_most), -(-length // BLOCK) * BLOCK)


class Lane:
    """Rows in one store per layer, (rows, K, width, H); row i is columns end - lengths[i] to end."""

    def __init__(self, width: int) -> None:
        self.width, self.end = width, 0
        self.members: list[Any] = []
        self.lengths: list[int] = []
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for store in (self.keys, self.values) for t in store.values())

    def begin(self, member: Any, blocks: Sequence[dict[int, tuple[Tensor, Tensor]]] = ()) -> None:
        """The first row of an empty lane, with the keys and values (K BLOCK H, by layer) of its first blocks."""
        self.members, self.lengths, self.end = [member], [len(blocks) * BLOCK], len(blocks) * BLOCK
        for layer in (blocks[0] if blocks else ()):
            k, v = (torch.cat([block[layer][i] for block in blocks], 1)[None] for i in (0, 1))
            self._allocate(layer, k, v)
            self.keys[layer][:1, :, :self.end], self.values[layer][:1, :, :self.end] = k, v

    def append(self, layer: int, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Stores T new positions of every row; returns the columns that hold anything, (rows K longest+T H)."""
        if layer not in self.keys:
            self._allocate(layer, k_BKTH, v_BKTH)
        rows, T = len(self.members), k_BKTH.shape[2]
        begin, end = self.end - self.longest, self.end + T
        keys, values = self.keys[layer], self.values[layer]
        keys[:rows, :, self.end:end].copy_(k_BKTH)
        values[:rows, :, self.end:end].copy_(v_BKTH)
        return keys[:rows, :, begin:end], values[:rows, :, begin:end]

    def advance(self, T: int) -> None:
        """Counts T positions as read; a negative T forgets the last ones."""
        self.end += T
        self.lengths = [length + T for length in self.lengths]

    def crowded(self, T: int) -> list[Any]:
        """Members that must move to a wider lane before T more positions are read."""
        if self.end + T <= self.width:
            return []
        limit = self.width - max(T, _SHIFT if len(self.members) > 1 else 0)
        return [member for member, length in zip(self.members, self.lengths) if length > limit]

    def shift(self, T: int) -> None:
        """Moves the rows to the left end, if there is no room for T more positions."""
        if self.end + T <= self.width:
            return
        longest, rows = self.longest, len(self.members)
        for store in (self.keys, self.values):
            for held in store.values():
                held[:rows, :, :longest] = held[:rows, :, self.end - longest:self.end].clone()
        self.end = longest

    def join(self, other: "Lane", index: int = 0, *, expected: int = 0) -> None:
        """Copies a row of another lane, member included, to the end of this one. `expected`: how many more will join
        soon, for whom there is place then, as growing copies every row."""
        length, rows = other.lengths[index], len(self.members)
        if length > self.end:
            self._move_end(length)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for layer, held in theirs.items():
                if layer not in mine or len(mine[layer]) == rows:
                    self._resize(mine, layer, held, max(rows + 1 + expected, rows * 3 // 2))
                mine[layer][rows, :, self.end - length:self.end] = held[index, :, other.end - length:other.end]
        self.members.append(other.members[index])
        self.lengths.append(length)

    def remove(self, member: Any) -> None:
        """Drops a row; the last row takes its place, and zeros the last place: see `_resize`."""
        at, last = next(i for i, held in enumerate(self.members) if held is member), len(self.members) - 1
        for store in (self.keys, self.values):
            for layer, held in store.items():
                if at != last:
                    held[at] = held[last]
                held[last] = 0
                if last and last <= len(held) // 2:
                    self._resize(store, layer, held, last)
        self.members[at], self.lengths[at] = self.members[last], self.lengths[last]
        self.members.pop()
        self.lengths.pop()

    def block(self, index: int, number: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Copies of the row's block `number`, by layer: keys and values (K BLOCK H)."""
        begin = self.end - self.lengths[index] + number * BLOCK
        return {layer: (self.keys[layer][index, :, begin:begin + BLOCK].clone(),
                        self.values[layer][index, :, begin:begin + BLOCK].clone()) for layer in self.keys}

    def _allocate(self, layer: int, k: Tensor, v: Tensor) -> None:
        for store, new in ((self.keys, k), (self.values, v)):
            store[layer] = new.new_zeros(len(self.members), new.shape[1], self.width, new.shape[3])

    def _resize(self, store: dict[int, Tensor], layer: int, like: Tensor, rows: int) -> None:
        """Zeros, not rubbish, where no row is: a masked key is multiplied by weight 0, and 0 times NaN is NaN."""
        larger = like.new_zeros(rows, like.shape[1], self.width, like.shape[3])
        if layer in store:
            kept = min(rows, len(store[layer]))
            larger[:kept] = store[layer][:kept]
        store[layer] = larger

    def _move_end(self, end: int) -> None:
        """Moves all rows to the right, where a longer one joins."""
        longest = self.longest
        for store in (self.keys, self.values):
            for held in store.values():
                held[:, :, end - longest:end] = held[:, :, self.end - longest:self.end].clone()
        self.end = end


class Reading:
    """The cache of one forward over these lanes: what attention and the decoder ask of one (`nn.attention.Cache`).

    Rows are those of the lanes in turn. Positions count as in a batch that is padded on the left to the longest row.
    """

    def __init__(self, lanes: Sequence[Lane], device: torch.device | str = "cpu") -> None:
        self.lanes = list(lanes)
        lengths = [length for lane in self.lanes for length in lane.lengths]
        self.length = max(lengths)
        self.start_B: Tensor | None = None
        if min(lengths) < self.length:
            self.start_B = torch.tensor([self.length - length for length in lengths], device=device)

    def append(self, layer: int, k_BKTH: Tensor, v_BKTH: Tensor) -> list[tuple[slice, Tensor, Tensor]]:
        """Stores T new positions; returns each lane's rows, and their keys and values, (rows K S H)."""
        parts, at = [], 0
        for lane in self.lanes:
            rows = slice(at, at := at + len(lane.members))
            parts.append((rows, *lane.append(layer, k_BKTH[rows], v_BKTH[rows])))
        return parts

    def update(self, layer: int, k_BKTH: Float[Tensor, "B K T H"], v_BKTH: Float[Tensor, "B K T H"],
               ) -> tuple[Float[Tensor, "B K S H"], Float[Tensor, "B K S H"]]:
        """As `KVCache.update`, for attention that wants all rows in one tensor; several lanes are copied into it."""
        parts = self.append(layer, k_BKTH, v_BKTH)
        if len(parts) == 1:
            return parts[0][1], parts[0][2]
        B, K, T, _ = k_BKTH.shape
        keys = k_BKTH.new_zeros(B, K, self.length + T, k_BKTH.shape[3])
        values = v_BKTH.new_zeros(B, K, self.length + T, v_BKTH.shape[3])
        for rows, k, v in parts:
            keys[rows, :, -k.shape[2]:], values[rows, :, -v.shape[2]:] = k, v
        return keys, values

    def columns(self) -> list[Columns]:
        """Where the rows are, lane by lane; none where a lane is empty or full."""
        if any(not lane.keys or lane.end == lane.width for lane in self.lanes):
            return []
        return [Columns(lane.keys, lane.values, [lane.end - length for length in lane.lengths], lane.end)
                for lane in self.lanes]

    def advance(self, T: int) -> None:
        for lane in self.lanes:
            lane.advance(T)
        self.length += T
