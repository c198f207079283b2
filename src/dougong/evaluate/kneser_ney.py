"""An interpolated modified Kneser–Ney model of bytes: the honest baseline that a language model must beat.

Chen & Goodman 1998 (TR-10-98, section 3): each order k keeps three discounts estimated from its counts of
counts; orders below the highest count in how many different contexts an n-gram occurs (eq. 27); the lowest is
interpolated with the uniform distribution over 256 bytes, so every byte has a probability and they sum to
one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dougong.core.errors import ConfigError, DataError
from dougong.evaluate.scores import DocumentScores

_SYMBOL_BITS = 9          # 256 bytes and the symbol before a document's first byte
_START = 256
_CHUNK_BYTES = 1 << 22    # n-grams sorted at a time, which bounds memory beside the table itself


class KneserNey:
    """n-gram model of bytes; n-grams are packed into sorted uint64 keys, the oldest byte highest, so that
    those of one context lie side by side and everything is a sort or a binary search.
    """

    def __init__(self, order: int = 5) -> None:
        """`order` is at most 7, as seven symbols of 9 bits fill a key. Raises ConfigError beyond."""
        if not 1 <= order <= 64 // _SYMBOL_BITS:
            raise ConfigError(f"order={order}: n-grams of 1 to {64 // _SYMBOL_BITS} bytes are possible.")
        self.order = order
        self._levels: list[_Level] = []

    def fit(self, texts: Iterable[bytes]) -> "KneserNey":
        """Counts the n-grams of the documents, each with `order - 1` start symbols before it. Raises
        DataError without a single byte.
        """
        keys, counts = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
        for chunk in _chunks(texts):
            new_keys, new_counts = np.unique(self._keys(chunk), return_counts=True)
            keys, counts = _merge(keys, counts, new_keys, new_counts)
        if not len(keys):
            raise DataError("the 5-gram baseline has no text to learn from: the training split is empty.")
        levels = []
        for order in range(self.order, 0, -1):
            levels.append(_Level.of(keys, counts))
            # Below the highest order an n-gram counts once for each different symbol before it.
            keys, counts = np.unique(keys & _mask(order - 1), return_counts=True)
        self._levels = levels[::-1]
        return self

    def nats(self, texts: Iterable[bytes]) -> np.ndarray:
        """Nats of each document: all its bytes, given up to `order - 1` bytes before each; its end is not
        scored.
        """
        totals: list[float] = []
        for chunk in _chunks(texts):
            unique, place = np.unique(self._keys(chunk), return_inverse=True)
            nats = -np.log(self._probabilities(unique))[place]
            ends = np.cumsum([len(text) for text in chunk])
            totals += [float(part.sum()) for part in np.split(nats, ends[:-1])]
        return np.array(totals)

    def distribution(self, context: bytes) -> np.ndarray:
        """Probabilities (256,) of the byte after `context`, which begins a document."""
        keys = self._keys([context + bytes([0])])[-1] | np.arange(256, dtype=np.uint64)
        return self._probabilities(keys)

    def score(self, documents: Iterable, *, name: str | None = None) -> DocumentScores:
        """Scores documents (`id`, `source`, `text`) by their UTF-8 bytes."""
        documents = list(documents)
        texts = [document.text.encode("utf-8") for document in documents]
        return DocumentScores(name=name or f"byte {self.order}-gram", ids=[d.id for d in documents],
                              sources=[d.source for d in documents], nats=self.nats(texts),
                              bytes=np.array([len(text) for text in texts]))

    def _keys(self, texts: list[bytes]) -> np.ndarray:
        """The packed n-gram that ends at each byte of each text, in order."""
        history = self.order - 1
        pad = np.full(history, _START, dtype=np.uint64)
        parts = [part for text in texts for part in (pad, np.frombuffer(text, dtype=np.uint8))]
        symbols = np.concatenate(parts).astype(np.uint64) if parts else np.empty(0, dtype=np.uint64)
        keys = np.zeros(max(len(symbols) - history, 0), dtype=np.uint64)
        for i in range(self.order):
            keys = keys << np.uint64(_SYMBOL_BITS) | symbols[i:i + len(keys)]
        return keys[keys & np.uint64(2**_SYMBOL_BITS - 1) != _START]   # a start symbol is never predicted

    def _probabilities(self, keys: np.ndarray) -> np.ndarray:
        """Interpolates from the uniform distribution up to the highest order."""
        assert self._levels, "fit before scoring"
        probability = np.full(len(keys), 1 / 256)
        for order, level in enumerate(self._levels, start=1):
            probability = level.interpolate(keys & _mask(order), probability)
        return probability


@dataclass(frozen=True)
class _Level:
    """One order: its n-grams' discounted counts and its contexts' totals and back-off weights."""

    keys: np.ndarray
    discounted: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    backoff: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, counts: np.ndarray) -> "_Level":
        discount = _discounts(counts)[np.minimum(counts, 3)]
        contexts, begins = np.unique(keys >> np.uint64(_SYMBOL_BITS), return_index=True)
        totals = np.add.reduceat(counts, begins)
        return cls(keys, counts - discount, contexts, totals, np.add.reduceat(discount, begins) / totals)

    def interpolate(self, keys: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """p(w|h) = (c(hw) - D) / c(h) + backoff(h) · p_lower(w); p_lower where the context was never seen."""
        context, seen = _find(self.contexts, keys >> np.uint64(_SYMBOL_BITS))
        place, known = _find(self.keys, keys)
        own = np.where(known, self.discounted[place], 0.0) / self.totals[context]
        return np.where(seen, own + self.backoff[context] * lower, lower)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """[0, D1, D2, D3+] (Chen & Goodman 1998, eq. 26).

    With little data the estimate does not exist (some count of 1 to 4 never occurs), or takes nothing from
    some count and so leaves no probability for what was never seen: then one discount of 0.75 for all.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    if n[1:5].all():
        y = n[1] / (n[1] + 2 * n[2])
        estimate = np.array([k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)])
        if (estimate > 0).all():
            return np.array([0, *estimate])
    return np.array([0, 0.75, 0.75, 0.75])


def _mask(order: int) -> np.uint64:
    return np.uint64(2 ** (_SYMBOL_BITS * order) - 1)


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each key stands in the sorted table (any place if absent), and whether it does."""
    place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return place, table[place] == keys


def _merge(keys_a: np.ndarray, counts_a: np.ndarray, keys_b: np.ndarray, counts_b: np.ndarray,
           ) -> tuple[np.ndarray, np.ndarray]:
    """The union of two sorted tables, counts added."""
    keys = np.concatenate([keys_a, keys_b])
    order = np.argsort(keys, kind="stable")   # a merge: both halves are sorted
    keys, counts = keys[order], np.concatenate([counts_a, counts_b])[order]
    begins = np.flatnonzero(np.diff(keys, prepend=keys[:1] + np.uint64(1)))
    return keys[begins], np.add.reduceat(counts, begins) if len(begins) else counts


def _chunks(texts: Iterable[bytes]) -> Iterable[list[bytes]]:
    """Documents in groups of about `_CHUNK_BYTES`."""
    group: list[bytes] = []
    held = 0
    for text in texts:
        group.append(text)
        held += len(text)
        if held >= _CHUNK_BYTES:
            yield group
            group, held = [], 0
    if group:
        yield group
