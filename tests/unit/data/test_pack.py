"""Packing drops nothing, repeats nothing, and keeps documents apart where it says so."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dougong.core.errors import ConfigError
from dougong.data import pack
from dougong.data.pack import BestFit, Stream, Windows, best_fit, choose_method

SEPARATOR = 0
BEGINS = 10_000       # the first token of a document where it is not what ends one
FIRSTS = st.sampled_from([None, BEGINS])
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=30)


class Store:
    """Documents of the given lengths, the first token included; every other one is its own position plus one."""

    def __init__(self, lengths: list[int], separator: int | None = SEPARATOR, first: int | None = None) -> None:
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.document_id, self.first_id = separator, separator if first is None else first
        self._stream = np.arange(1, self.starts[-1] + 1)
        if separator is not None:
            self._stream[self.starts[:-1]] = self.first_id

    def read(self, start, stop):
        return self._stream[start:stop]

    def pairs(self) -> Counter:
        """Every (token, next token) that training should see; behind each document what ends it."""
        following = np.roll(self._stream, -1)
        if self.document_id is not None:
            following[self.starts[1:] - 1] = self.document_id
        return Counter(zip(self._stream.tolist(), following.tolist()))


def seen(fields) -> Counter:
    counts = fields["weight"] > 0
    assert set(np.unique(fields["weight"])) <= {0, 1} and fields["weight"].dtype == np.float32
    return Counter(zip(fields["tokens"][counts].tolist(), fields["targets"][counts].tolist()))


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, context=st.integers(1, 20), phase=st.integers(0, 40), first=FIRSTS)
def test_windows_show_every_target_once_at_every_phase(lengths, context, phase, first):
    store = Store(lengths, first=first)
    windows = Windows(Stream(store, 0, len(lengths)), context)
    fields = windows.fields(np.arange(windows.rows), phase)
    assert fields["tokens"].shape == (windows.rows, context) and "segment" not in fields
    assert seen(fields) == store.pairs()
    assert windows.rows == -(-sum(lengths) // context)
    assert windows.facts()["padding_share"] == pytest.approx(1 - sum(lengths) / fields["weight"].size)


def test_windows_start_where_the_phase_says():
    windows = Windows(Stream(Store([100], separator=None), 0, 1), 10)
    assert windows.fields(np.array([0, 3]), 7)["tokens"][:, 0].tolist() == [8, 38]


@settings(max_examples=30, deadline=None)
@given(length=st.integers(2, 50), context=st.integers(1, 20), phase=st.integers(0, 40))
def test_a_stream_without_borders_does_not_predict_its_start_from_its_end(length, context, phase):
    store = Store([length], separator=None)
    windows = Windows(Stream(store, 0, 1), context)
    expected = store.pairs()
    del expected[length, 1]
    assert seen(windows.fields(np.arange(windows.rows), phase)) == expected


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, context=st.integers(1, 20), first=FIRSTS)
def test_best_fit_shows_every_target_once_and_keeps_documents_apart(tmp_path_factory, lengths, context, first):
    store = Store(lengths, first=first)
    rows = BestFit(Stream(store, 0, len(lengths)), context, tmp_path_factory.mktemp("pack") / "index")
    fields = rows.fields(np.arange(rows.rows))
    assert seen(fields) == store.pairs()
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    position_of = {
        token: position for position, token in enumerate(store._stream.tolist()) if token != store.first_id
    }
    segment = fields.get("segment", np.zeros_like(fields["tokens"]))
    for row in range(rows.rows):
        real = fields["weight"][row] > 0
        for number in np.unique(segment[row][real]):
            mine = fields["tokens"][row][real & (segment[row] == number)]
            assert (
                len({document_of[position_of[token]] for token in mine.tolist() if token != store.first_id}) <= 1
            )
            assert (np.diff(mine[1:]) == 1).all()     # in their order in the document
        assert not set(segment[row][real]) & set(segment[row][~real]) or "segment" not in fields
    facts = rows.facts()
    assert facts["documents_cut"] == sum(length > context for length in lengths)
    assert facts["padding_share"] == pytest.approx((fields["weight"] == 0).mean())


def test_documents_of_one_source_end_where_they_end_whatever_lies_around_them(tmp_path):
    store = Store([4, 3, 1, 5, 2], first=BEGINS)
    part = Stream(store, 1, 4)
    expected = [(BEGINS, 6), (6, 7), (7, SEPARATOR), (BEGINS, SEPARATOR), (BEGINS, 10), (10, 11), (11, 12), (12, 13),
                (13, SEPARATOR)]
    for rows in (Windows(part, 4), BestFit(part, 4, tmp_path / "index")):
        for phase in range(9):
            assert sorted(seen(rows.fields(np.arange(rows.rows), phase)).elements()) == sorted(expected)


def test_segment_is_absent_where_rows_hold_one_document(tmp_path):
    stream = Stream(Store([8, 8, 3]), 0, 3)
    assert "segment" not in BestFit(stream, 8, tmp_path / "a").fields(np.arange(3))
    assert "segment" in BestFit(stream, 12, tmp_path / "b").fields(np.arange(2))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=60))
def test_best_fit_chooses_the_smallest_gap_as_a_plain_search_does(lengths):
    context, free = 30, []
    for length in sorted(lengths, reverse=True):
        fitting = [gap for gap in free if gap >= length]
        if fitting:
            free.remove(min(fitting))
            free.append(min(fitting) - length)
        else:
            free.append(context - length)
    row_of = best_fit(np.array(lengths, dtype=np.int64), context)
    used = np.bincount(row_of, weights=lengths) if lengths else np.empty(0)
    assert sorted(context - used) == sorted(free)


def test_blocks_are_packed_one_after_the_other(tmp_path, monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 40, 300).tolist()
    whole = BestFit(Stream(Store(lengths), 0, 300), 16, tmp_path / "whole")
    monkeypatch.setattr(pack, "_BLOCK_DOCUMENTS", 64)
    blocks = BestFit(Stream(Store(lengths), 0, 300), 16, tmp_path / "blocks")
    assert seen(blocks.fields(np.arange(blocks.rows))) == Store(lengths).pairs()
    assert whole.rows <= blocks.rows <= whole.rows + 5


def test_the_index_is_written_once_and_an_unfinished_one_again(tmp_path):
    stream = Stream(Store([5, 9, 2]), 0, 3)
    first = BestFit(stream, 6, tmp_path / "index").fields(np.arange(3))
    written = (tmp_path / "index" / "starts.i64").stat().st_mtime_ns
    BestFit(stream, 6, tmp_path / "index")
    assert (tmp_path / "index" / "starts.i64").stat().st_mtime_ns == written
    (tmp_path / "index" / "manifest.json").unlink()
    (tmp_path / "index" / "starts.i64").write_bytes(b"")
    again = BestFit(stream, 6, tmp_path / "index").fields(np.arange(3))
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_best_fit_without_a_separator_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="separator"):
        BestFit(Stream(Store([5], separator=None), 0, 1), 4, tmp_path)


def test_a_stream_of_some_documents_ends_where_they_end():
    store = Store([4, 6, 5])
    stream = Stream(store, 1, 2)
    assert stream.tokens == 6 and stream.read(4, 5).tolist() == [9, 10, 0, 6, 7]


@pytest.mark.parametrize(("lengths", "separator", "method"), [
    ([1000, 5, 5], 0, "windows"), ([20] * 100, 0, "best_fit"), ([20] * 100, None, "windows"),
    ([50] * 10 + [101] * 4, 0, "best_fit"), ([50] * 10 + [101] * 6, 0, "windows")])
def test_packing_follows_the_documents(lengths, separator, method):
    chosen, reason = choose_method(Store(lengths, separator), 100)
    assert chosen == method and reason
