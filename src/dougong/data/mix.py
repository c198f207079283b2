"""Which row comes next: a seeded permutation per epoch, and quotas between sources; both found in O(1).

Nothing here is drawn from a stream of random numbers, so any position of the sequence can be computed by
itself.
"""

from dataclasses import dataclass

import numpy as np

from dougong.core.errors import ConfigError
from dougong.runtime.seeds import derive

_ROUNDS = 10
_PERIOD = 1 << 14      # rows after which quotas repeat; shares are kept to one part in this many
_MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Permutation:
    """A seeded permutation of 0 … size-1 that is computed, not stored: a Feistel network with cycle walking.

    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains": outputs beyond `size` are encrypted
    again.)
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
        self._mask = (np.uint64(1) << self._half) - np.uint64(1)
        self._keys = [np.uint64(derive(seed, "round", number)) for number in range(_ROUNDS)]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Where each index (int64) goes."""
        values = self._scramble(indices.astype(np.uint64))
        while (beyond := values >= self.size).any():
            values[beyond] = self._scramble(values[beyond])
        return values.astype(np.int64)

    def _scramble(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_hashed(right, key) & self._mask)
        return left << self._half | right


def _hashed(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """The mixing function of splitmix64 (Steele et al. 2014); overflow is meant."""
    with np.errstate(over="ignore"):
        values = values * np.uint64(0x9E3779B97F4A7C15) + key
        values = (values ^ values >> np.uint64(30)) * _MIX[0]
        values = (values ^ values >> np.uint64(27)) * _MIX[1]
    return values ^ values >> np.uint64(31)


@dataclass(frozen=True)
class Place:
    """Rows of the sequence that come from one part: where they stand in the request, and which they are."""

    part: int
    epoch: int                  # of that part: how often it has been gone through before
    slots: np.ndarray           # indices into the positions asked for
    rows: np.ndarray            # rows of the part


class Mixture:
    """One endless sequence over parts of `sizes` rows, each with its share, each shuffled every epoch.

    Position p belongs to the part that a table of fixed period says; every part meets its quota at every
    moment to within a row. A part that runs out begins its next epoch, in a new order.
    """

    def __init__(self, sizes: list[int], shares: list[float], seed: int) -> None:
        self.sizes, self.seed = sizes, seed
        counts = _quotas(shares)
        due = np.concatenate(
            [(np.arange(count) + 0.5) / count for count in counts]
        )  # evenly spread over a period
        owner = np.repeat(np.arange(len(counts)), counts)
        order = np.argsort(due, kind="stable")
        self._owner = owner[order]                                       # part of each position of a period
        self._rank = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts))[order]
        self._counts = counts
        self.shares = (counts / counts.sum()).tolist()

    @property
    def rows_per_epoch(self) -> int:
        """As many as all parts have: with equal shares per row, every row once."""
        return sum(self.sizes)

    def at(self, positions: np.ndarray) -> list[Place]:
        """What stands at these positions (int64) of the sequence, grouped by part and epoch."""
        period, offset = np.divmod(positions, len(self._owner))
        owner = self._owner[offset]
        drawn = period * self._counts[owner] + self._rank[offset]        # how many rows the part gave before
        places = []
        for part in np.unique(owner).tolist():
            slots = np.flatnonzero(owner == part)
            epochs, index = np.divmod(drawn[slots], self.sizes[part])
            for epoch in np.unique(epochs).tolist():
                here = epochs == epoch
                shuffle = Permutation(self.sizes[part], derive(self.seed, "order", part, epoch))
                places.append(Place(part, epoch, slots[here], shuffle(index[here])))
        return places


def _quotas(shares: list[float]) -> np.ndarray:
    """Rows of each part in a period, at least one; what rounding leaves goes to the largest remainders."""
    if len(shares) == 1:
        return np.ones(1, np.int64)
    if min(shares) <= 0 or len(shares) > _PERIOD:
        raise ConfigError(
            f"shares of a mixture must be above 0, but they are {shares}. Leave a source out instead."
        )
    exact = np.asarray(shares) / sum(shares) * _PERIOD
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    for index in np.argsort(np.floor(exact) - exact, kind="stable")[:max(0, _PERIOD - int(counts.sum()))]:
        counts[index] += 1
    return counts
