"""Splits: no document on both sides, stable under growth, and the tail rule cut to the character."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dougong.core.config import from_dict
from dougong.core.errors import ConfigError
from dougong.data.split import ROW, SplitConfig, by_hash, cut_tail, divide

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


def stream(texts):
    data = [text.encode() for text in texts]
    ends = np.cumsum([len(d) for d in data])
    rows = np.zeros(len(data), ROW)
    rows["stop"], rows["start"] = ends, ends - [len(d) for d in data]
    return rows, np.frombuffer(b"".join(data), np.uint8)


def join(rows, text):
    return b"".join(text[row["start"]:row["stop"]].tobytes() for row in rows)


def random_digests(count, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 63, (count, 2)).astype(np.uint64)


def test_shares_follow_the_fractions_and_the_seed():
    digests = random_digests(20_000)
    split = by_hash(digests, (0.8, 0.15, 0.05), seed=1)
    assert np.bincount(split) / len(split) == pytest.approx([0.8, 0.15, 0.05], abs=0.012)
    assert (split != by_hash(digests, (0.8, 0.15, 0.05), seed=2)).mean() > 0.2
    assert (by_hash(digests, (1.0, 0.0, 0.0), seed=1) == 0).all()


def test_a_document_keeps_its_side_when_others_come_and_go():
    digests = random_digests(500)
    order = np.random.default_rng(1).permutation(500)[:300]
    shares = (0.9, 0.05, 0.05)
    assert (by_hash(digests, shares, 7)[order] == by_hash(digests[order], shares, 7)).all()


@given(st.lists(UNICODE, min_size=1, max_size=12),
       st.sampled_from([(0.9, 0.1, 0.0), (0.8, 0.1, 0.1), (0.5, 0.0, 0.5)]))
def test_without_a_gap_the_parts_are_slices_of_the_characters(texts, fractions):
    rows, data = stream(texts)
    whole = "".join(texts)
    n = len(whole)
    a, b = int(n * fractions[0]), int(n * (fractions[0] + fractions[1])) if fractions[2] else n
    expected = [whole[:a], whole[a:b], whole[b:]]
    parts = cut_tail(rows, data, fractions, 0)
    if any(not part and share for part, share in zip(expected, fractions)):
        assert parts is None
    else:
        assert [join(part, data).decode() for part in parts] == expected


@given(st.lists(UNICODE, min_size=3, max_size=12), st.integers(0, 30))
def test_a_gap_separates_the_parts_and_splits_no_character(texts, gap):
    rows, data = stream(texts)
    whole = "".join(texts).encode()
    parts = cut_tail(rows, data, (0.6, 0.2, 0.2), gap)
    if parts is None:
        return
    pieces = [join(part, data) for part in parts]
    assert all(piece and piece.decode() for piece in pieces)
    assert whole.startswith(pieces[0]) and whole.endswith(pieces[2])
    text = whole.decode()
    held_out = len(text) - int(len(text) * (0.6 + 0.2))
    assert len(pieces[2].decode()) == held_out   # a gap costs training, not what is held out
    places = [(part["start"].min(), part["stop"].max()) for part in parts]
    for (_, stop), (start, _) in pairwise(places):
        assert gap <= start - stop < gap + 4


def test_a_large_document_is_cut_across_chunks(monkeypatch):
    monkeypatch.setattr("dougong.data.split._CHUNK", 7)
    text = "斗a拱é" * 100
    rows, data = stream([text[:130], text[130:]])
    parts = cut_tail(rows, data, (0.9, 0.1, 0.0), 0)
    assert join(parts[0], data).decode() == text[:int(len(text) * 0.9)]


@pytest.mark.parametrize(("sizes", "rule"), [
    ([100] * 49, "tail"), ([100] * 200, "documents"), ([100] * 200 + [10_000], "tail"),
    ([100] * 200 + [4_000], "documents")])
def test_the_rule_follows_number_and_sizes(sizes, rule):
    rows, data = stream(["x" * size for size in sizes])
    digests = random_digests(len(sizes))
    division = divide(lambda: iter([(rows, digests)]), data, SplitConfig(), context_bytes=10, seed=0)
    assert division.rule == rule
    sides = [{(int(r["start"]), int(r["stop"])) for part in division.rows(k) for r in part} for k in range(3)]
    assert all(sides)
    assert not (sides[0] & sides[1] or sides[1] & sides[2] or sides[0] & sides[2])
    assert division.gap_bytes == (10 if rule == "tail" else 0)


def test_fractions_must_add_up():
    for bad in ([0.9, 0.2, 0.1], [0, 0.5, 0.5], [1.2, -0.1, -0.1]):
        with pytest.raises(ConfigError, match="add up to 1"):
            from_dict(SplitConfig, {"fractions": bad})
