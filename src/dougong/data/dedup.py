"""Duplicates: exact ones by a hash of the normalised text, near ones by MinHash, banding and an exact check.

A document is removed only if an earlier one stays to which it is equal, or whose set of shingles overlaps its
own by a Jaccard index of at least the threshold. Signatures, band keys and results lie on disk, and equal
keys are found one slice of the key space at a time, so memory does not grow with the corpus.
"""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from dougong.core.config import config

HASHES = 128                     # bins of a signature; the estimate's standard error at 0.8 is 0.035
_RECALL = 0.995                  # of pairs exactly at the threshold, that banding alone must propose
_MARGIN = 4.0                    # standard errors by which an estimate may fall short and yet be checked
_LEADERS = 64                    # documents of one band's bucket that others are compared with, at most
_KEYS_AT_ONCE = 4 << 20
_BLOCK = 1 << 20                 # code points hashed at a time
_MIX1, _MIX2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_SPACE, _WORD, _ALONE = 0, 1, 2


@config
class DedupConfig:
    """Removal of duplicate documents before the split."""

    exact: bool = True
    """remove documents equal to an earlier one but for white space and Unicode composition"""
    near: bool = True
    """remove documents nearly equal to an earlier one"""
    threshold: float = Field(default=0.8, ge=0.5, le=1.0)
    """Jaccard index of the shingle sets from which two documents count as near duplicates"""
    shingle: int = Field(default=5, ge=1, le=32)
    """words (or Chinese characters, or signs) in a shingle"""


def digest(value: Any) -> bytes:
    """16 bytes that are equal for texts equal up to white space and Unicode composition (NFC), and for JSON values
    whose texts are."""
    normal = _normal(value)
    text = normal if isinstance(normal, str) else json.dumps(normal, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _normal(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFC", value).split())
    if isinstance(value, dict):
        return {key: _normal(inner) for key, inner in value.items()}
    return [_normal(inner) for inner in value] if isinstance(value, list | tuple) else value


# ---- shingles

def shingles(text: str, length: int) -> np.ndarray:
    """Sorted distinct hashes (uint64) of all runs of `length` units; of the whole text where it has fewer.

    A unit is a word, or a single character of a script written without spaces (Chinese, Japanese, Thai …), or
    a single sign; case and white space do not count.
    """
    lower = text.lower()
    blocks = [_unit_hashes(lower[at:at + _BLOCK]) for at in range(0, len(lower), _BLOCK)]
    units = np.concatenate(blocks) if blocks else np.empty(0, np.uint64)
    if not len(units):
        return units
    length = min(length, len(units))
    count = len(units) - length + 1
    sums = np.zeros(count, np.uint64)
    for offset in range(length):
        sums *= _MIX1   # a polynomial in _MIX1: order matters
        sums += units[offset:offset + count]
    return np.unique(_mixed(sums))


def _unit_hashes(text: str) -> np.ndarray:
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _kinds()[points]
    starts = kinds == _ALONE
    starts[0] |= kinds[0] == _WORD
    starts[1:] |= (kinds[1:] == _WORD) & (kinds[:-1] != _WORD)
    inside = kinds != _SPACE
    begins = np.flatnonzero(starts[inside])
    if not len(begins):
        return np.empty(0, np.uint64)
    points = points[inside].astype(np.uint64)
    lengths = np.diff(begins, append=len(points))
    place = (np.arange(len(points)) - np.repeat(begins, lengths)) & 63
    return _mixed(np.add.reduceat((points + np.uint64(1)) * _powers()[place], begins))


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(33))) * _MIX1
    values = (values ^ (values >> np.uint64(33))) * _MIX2
    return values ^ (values >> np.uint64(33))


@cache
def _powers() -> np.ndarray:
    return np.cumprod(np.full(64, _MIX2 | np.uint64(1), np.uint64))


@cache
def _kinds() -> np.ndarray:
    """Of every code point: white space or control, part of a word, or a unit of its own."""
    table = np.full(0x110000, _ALONE, np.uint8)
    for point in range(0x30000):   # above lie only ideographs, tags and private use
        sign = chr(point)
        if sign.isalnum() or sign == "_" or unicodedata.category(sign)[0] == "M":
            table[point] = _WORD
        elif sign.isspace() or unicodedata.category(sign)[0] == "C":
            table[point] = _SPACE
    for low, high in ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x31FF),
                      (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x1B000, 0x1B16F),
                      (0x20000, 0x2FFFF)):
        span = table[low:high + 1]
        span[span == _WORD] = _ALONE   # Thai, Lao, Burmese, Khmer, kana, ideographs
    return table


# ---- signatures

def signature(hashes: np.ndarray) -> np.ndarray:
    """MinHash signature (uint32, 128) of sorted distinct hashes: the least of each of 128 bins of the hash
    space.

    One permutation hashing (Li, Owen, Zhang 2012, arXiv:1208.1259); an empty bin takes the value of the first
    filled one in an order of its own, the same for all documents (Shrivastava 2017, arXiv:1703.04664). Two
    signatures agree in a place with a probability equal to the sets' Jaccard index.
    """
    edges = np.arange(HASHES, dtype=np.uint64) << np.uint64(64 - HASHES.bit_length() + 1)
    first = np.searchsorted(hashes, edges)
    following = np.append(first[1:], len(hashes))
    filled = first < following
    least = (hashes[np.minimum(first, len(hashes) - 1)] & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    orders = _orders()
    return least[orders[np.arange(HASHES), filled[orders].argmax(axis=1)]]


@cache
def _orders() -> np.ndarray:
    """For each bin the order in which it looks for a filled one: itself, then a permutation of its own."""
    random = np.random.Generator(np.random.PCG64(20170400))
    ranks = random.random((HASHES, HASHES))
    np.fill_diagonal(ranks, -1.0)
    return ranks.argsort(axis=1)


def rows_per_band(threshold: float) -> int:
    """The most rows a band may have so that banding still proposes 99.5 % of pairs at the threshold.

    A pair of Jaccard index s shares at least one of b bands of r rows with probability 1 - (1 - s^r)^b.
    """
    return max(rows for rows in range(1, 33)
               if rows == 1 or 1 - (1 - threshold ** rows) ** (HASHES // rows) >= _RECALL)


def _band_keys(signatures: np.ndarray, band: int, rows: int, path: Path) -> np.ndarray:
    keys = np.memmap(path, np.uint64, "w+", shape=(len(signatures),))
    for at in range(0, len(signatures), _KEYS_AT_ONCE // 8):
        columns = signatures[at:at + _KEYS_AT_ONCE // 8, band * rows:(band + 1) * rows].astype(np.uint64)
        key = np.zeros(len(columns), np.uint64)
        for column in columns.T:
            key = _mixed(key + column + np.uint64(1))
        keys[at:at + len(key)] = key
    return keys


# ---- search

def equal_groups(keys: np.ndarray, *, at_once: int = _KEYS_AT_ONCE) -> Iterator[np.ndarray]:
    """Yields the ascending places of each key that occurs more than once; holds about `at_once` keys."""
    slices = max(1, -(-len(keys) // at_once))
    for part in range(slices):
        places = np.concatenate([np.flatnonzero(keys[at:at + at_once] % np.uint64(slices) == part) + at
                                 for at in range(0, len(keys), at_once)] or [np.empty(0, np.int64)])
        values = np.asarray(keys[places])
        order = np.argsort(values, kind="stable")
        bounds = np.flatnonzero(np.diff(values[order])) + 1
        starts, stops = np.append(0, bounds), np.append(bounds, len(order))
        for start, stop in zip(starts, stops):
            if stop - start > 1:
                yield places[order[start:stop]]


def exact_duplicates(digests: np.ndarray, keeper_path: Path) -> np.ndarray:
    """For each document the earlier one it equals, or -1: int64 on disk. `digests` is (n, 2) uint64."""
    keeper = _keepers(len(digests), keeper_path)
    for group in equal_groups(digests[:, 0]):
        while len(group) > 1:
            same = digests[group, 1] == digests[group[0], 1]
            keeper[group[same][1:]] = group[0]
            group = group[~same]
    return keeper


def near_duplicates(signatures: np.ndarray, excluded: np.ndarray, shingles_of: Callable[[int], np.ndarray],
                    threshold: float, scratch: Path, *,
                    progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """For each document the earlier kept one it nearly equals, or -1: int64 in `scratch`.

    Documents whose `excluded` is not -1 take no part. `shingles_of(i)` reads document i again, only for
    candidates. `progress(bands done, bands)` is told how far the search is.
    """
    @lru_cache(maxsize=16)
    def shingle_set(i: int) -> np.ndarray:
        return shingles_of(i)

    @lru_cache(maxsize=1 << 16)
    def similar(i: int, j: int) -> bool:
        return jaccard(shingle_set(i), shingle_set(j)) >= threshold

    keeper = _keepers(len(signatures), scratch / "near")
    rows = rows_per_band(threshold)
    least = threshold - _MARGIN * (threshold * (1 - threshold) / HASHES) ** 0.5
    for band in range(HASHES // rows):
        for group in equal_groups(_band_keys(signatures, band, rows, scratch / "keys")):
            group = group[(excluded[group] < 0) & (keeper[group] < 0)]
            for _ in range(_LEADERS):
                if len(group) < 2:
                    break
                leader, group = group[0], group[1:]
                likely = (signatures[group] == signatures[leader]).mean(axis=1) >= least
                found = np.array([bool(hint) and similar(int(leader), int(i))
                                  for hint, i in zip(likely, group)])
                keeper[group[found]] = leader
                group = group[~found]
        if progress:
            progress(band + 1, HASHES // rows)
    _follow(keeper, similar)
    return keeper


def _follow(keeper: np.ndarray, similar: Callable[[int, int], bool]) -> None:
    """Where a keeper was itself removed, its own keeper takes over, or the document comes back."""
    for at in range(0, len(keeper), _KEYS_AT_ONCE):
        for i in np.flatnonzero(keeper[at:at + _KEYS_AT_ONCE] >= 0) + at:   # ascending: keepers are settled
            above = keeper[keeper[i]]
            if above >= 0:
                keeper[i] = above if similar(int(above), int(i)) else -1


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over size of the union of two sorted distinct arrays."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(1, len(a) + len(b) - common)


def _keepers(count: int, path: Path) -> np.ndarray:
    keeper = np.memmap(path, np.int64, "w+", shape=(count,))
    for at in range(0, count, _KEYS_AT_ONCE):
        keeper[at:at + _KEYS_AT_ONCE] = -1
    return keeper
