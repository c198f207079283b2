"""Train, validation, test: by document hash, or, for few or very unequal documents, by contiguous tail."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import field_validator

from dougong.core.config import config
from dougong.data.dedup import _mixed

SPLITS = ("train", "validation", "test")
FEW_DOCUMENTS = 50
LARGE_SHARE = 0.2
_CHUNK = 1 << 24

ROW = np.dtype([("start", "i8"), ("stop", "i8"), ("name_start", "i8"), ("name_stop", "i8"), ("source", "i4")])
"""One document, or the part of one that a split holds: its bytes in the text file, its name's, its source."""


@config
class SplitConfig:
    """How documents are divided between training, validation and test."""

    fractions: tuple[float, float, float] = (0.9, 0.05, 0.05)
    """of training, validation and test; they add up to 1, and validation and test may be 0"""
    rule: Literal["auto", "documents", "tail"] = "auto"
    """documents: by a hash of each document; tail: training is the beginning of each source, then come
    validation and test; auto: tail for a source of fewer than 50 documents or with one of over 20 % of its
    bytes"""
    gap_bytes: int | None = None
    """bytes left out before each cut of the tail rule, so that no context straddles it; None: one context"""

    @field_validator("fractions")
    @classmethod
    def _adds_up(cls, fractions: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(fractions) < 0 or fractions[0] == 0 or abs(sum(fractions) - 1) > 1e-9:
            raise ValueError("give three shares that add up to 1, training's above 0: [0.9, 0.05, 0.05]")
        return fractions

    @field_validator("gap_bytes")
    @classmethod
    def _not_negative(cls, gap: int | None) -> int | None:
        if gap is not None and gap < 0:
            raise ValueError("a gap has 0 or more bytes")
        return gap


@dataclass(frozen=True)
class Division:
    """How one source is divided: the rule, why, and `rows(split)`, which streams a split's rows in order."""

    rule: str
    reason: str
    gap_bytes: int
    rows: Callable[[int], Iterator[np.ndarray]]


Chunks = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]   # kept (rows, digests) in order, any time


def by_hash(digests: np.ndarray, fractions: tuple[float, ...], seed: int) -> np.ndarray:
    """The split (0, 1, 2) of each document from its content's digest (n 2, uint64) alone, so it never changes
    when others are added, and equal documents are always on the same side."""
    mixed = _mixed(_mixed(digests[:, 0] ^ np.uint64(seed)) + digests[:, 1])
    place = (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53
    return np.searchsorted(np.cumsum(fractions[:2]), place, side="right").astype(np.int8)


def divide(chunks: Chunks, text: np.ndarray, section: SplitConfig, *, context_bytes: int,
           seed: int) -> Division:
    """Chooses the rule for one source and applies it. `text` is the text file's bytes."""
    documents, total, largest = 0, 0, 0
    found = np.zeros(3, np.int64)
    for rows, digests in chunks():
        sizes = rows["stop"] - rows["start"]
        documents, total = documents + len(rows), total + sizes.sum()
        largest = max(largest, sizes.max(initial=0))
        found += np.bincount(by_hash(digests, section.fractions, seed), minlength=3)
    reason = _why_tail(section, documents, largest / max(1, total), found)
    if not reason:
        return Division("documents", f"{documents:,} documents, each on the side its hash says", 0,
                        lambda split: _hashed(chunks, section.fractions, seed, split))
    kept = np.concatenate([rows for rows, _ in chunks()] or [np.empty(0, ROW)])
    gap = context_bytes if section.gap_bytes is None else section.gap_bytes
    cut = cut_tail(kept, text, section.fractions, gap) or []
    if not cut:
        cut, reason = [kept, kept[:0], kept[:0]], f"{reason}, too small to be cut: all of it trains"
    return Division("tail", reason, gap, lambda split: iter([cut[split]]))


def _why_tail(section: SplitConfig, documents: int, share: float, found: np.ndarray) -> str:
    if section.rule != "auto":
        return "asked for" if section.rule == "tail" else ""
    if documents < FEW_DOCUMENTS:
        return f"{documents} document{'s are' if documents != 1 else ' is'} fewer than {FEW_DOCUMENTS}"
    if share > LARGE_SHARE:
        return f"one document holds {share:.0%} of the bytes"
    if any(count == 0 < fraction for count, fraction in zip(found, section.fractions)):
        return f"the hash would leave a split of these {documents} documents empty"
    return ""


def _hashed(chunks: Chunks, fractions: tuple[float, ...], seed: int, split: int) -> Iterator[np.ndarray]:
    for rows, digests in chunks():
        yield rows[by_hash(digests, fractions, seed) == split]


def cut_tail(rows: np.ndarray, text: np.ndarray, fractions: tuple[float, float, float],
             gap_bytes: int) -> list[np.ndarray] | None:
    """Cuts the stream of `rows` at int(characters · share), so that 90/10 without a gap is exactly nanoGPT's
    `text[:int(n * 0.9)]`. A gap is taken from training: the parts held out keep their size and move towards
    the beginning. None where a wanted part would be empty.
    """
    sizes = rows["stop"] - rows["start"]
    ends = np.cumsum(sizes)
    characters = np.array([count_characters(text[row["start"]:row["stop"]]) for row in rows], np.int64)
    total = int(characters.sum())
    shares = [fractions[0], fractions[0] + fractions[1] if fractions[2] else 1.0]
    cuts = [0, *(_byte_of(int(total * share), characters, rows, text) for share in shares), int(sizes.sum())]
    parts = [rows[:0]] * 3
    low = cuts[3] + gap_bytes
    for split in (2, 1, 0):   # from the end, each a gap before the one that follows
        if not fractions[split]:
            continue
        high = _character_start(low - gap_bytes, rows, ends, text)
        low = _character_start(high - (cuts[split + 1] - cuts[split]), rows, ends, text) if split else 0
        if high <= low or low < 0:
            return None
        parts[split] = _between(rows, ends, low, high)
    return parts


def count_characters(data: np.ndarray) -> int:
    """Code points in UTF-8 bytes: all bytes but continuations."""
    return sum(int(np.count_nonzero(data[at:at + _CHUNK] & 0xC0 != 0x80))
               for at in range(0, len(data), _CHUNK))


def _byte_of(character: int, characters: np.ndarray, rows: np.ndarray, text: np.ndarray) -> int:
    """The byte of the stream at which its n-th character begins."""
    row = int(np.searchsorted(np.cumsum(characters), character, side="right"))
    before = int((rows["stop"] - rows["start"])[:row].sum())
    if row == len(rows):
        return before
    left = character - int(characters[:row].sum())
    start, stop = int(rows[row]["start"]), int(rows[row]["stop"])
    for at in range(start, stop, _CHUNK):
        begins = np.flatnonzero(text[at:min(at + _CHUNK, stop)] & 0xC0 != 0x80)
        if left < len(begins):
            return before + at - start + int(begins[left])
        left -= len(begins)
    raise AssertionError("a row holds fewer characters than were counted")


def _character_start(byte: int, rows: np.ndarray, ends: np.ndarray, text: np.ndarray) -> int:
    """The nearest start of a character at or before a byte of the stream."""
    row = int(np.searchsorted(ends, byte, side="right"))
    if byte < 0 or row == len(rows):
        return byte
    place = int(rows[row]["stop"] - (ends[row] - byte))
    back = 0
    while text[place - back] & 0xC0 == 0x80:
        back += 1
    return byte - back


def _between(rows: np.ndarray, ends: np.ndarray, low: int, high: int) -> np.ndarray:
    """The rows, or parts of rows, between two bytes of the stream."""
    starts = ends - (rows["stop"] - rows["start"])
    inside = (ends > low) & (starts < high)
    part = rows[inside].copy()
    part["start"] += np.maximum(0, low - starts[inside])
    part["stop"] -= np.maximum(0, ends[inside] - high)
    return part
