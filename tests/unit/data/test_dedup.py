"""Duplicates: recall on planted ones, hardly a false removal, and agreement with sets counted one by one."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dougong.data import dedup
from dougong.data.dedup import (
    digest,
    equal_groups,
    exact_duplicates,
    jaccard,
    near_duplicates,
    shingles,
    signature,
)


def words(random, count, vocabulary=5000):
    return [f"w{i}" for i in random.integers(0, vocabulary, count)]


def oracle(text, length=5):
    """Shingles as tuples, for texts of ASCII words and Chinese characters."""
    units = re.findall(r"[a-z0-9_]+|[^\sa-z0-9_]", text.lower())
    length = min(length, len(units))
    return {tuple(units[i:i + length]) for i in range(len(units) - length + 1)}


def edited(random, units, edits):
    units = list(units)
    for place in random.choice(len(units), edits, replace=False):
        units[place] = f"new{random.integers(1 << 40)}"
    return units


def search(texts, tmp_path, threshold=0.8):
    signatures = np.stack([signature(shingles(text, 5)) for text in texts])
    return near_duplicates(signatures, np.full(len(texts), -1), lambda i: shingles(texts[i], 5), threshold,
                           tmp_path)


@given(st.text("ab斗拱 \n.,A", max_size=60), st.text("ab斗拱 \n.,A", max_size=60), st.integers(1, 6))
def test_shingle_sets_are_those_counted_one_by_one(a, b, length):
    x, y = shingles(a, length), shingles(b, length)
    p, q = oracle(a, length), oracle(b, length)
    if a.strip() and b.strip():
        assert (len(x), len(y)) == (len(p), len(q))
        assert jaccard(x, y) == pytest.approx(len(p & q) / len(p | q), abs=1e-12)


def test_blocks_do_not_change_shingles(monkeypatch):
    random = np.random.default_rng(0)
    text = " ".join(words(random, 3000)) + "斗拱" * 50
    whole = shingles(text, 5)
    monkeypatch.setattr(dedup, "_BLOCK", 4000)
    assert jaccard(whole, shingles(text, 5)) > 0.98   # a word cut by a block's end changes five shingles


def test_estimates_are_as_good_as_minhash_allows():
    random = np.random.default_rng(1)
    datasketch = pytest.importorskip("datasketch")
    errors, reference = [], []
    for _ in range(120):
        a = random.integers(0, 1 << 64, 2000, dtype=np.uint64)
        b = a.copy()
        changed = random.integers(100, 1500)
        b[:changed] = random.integers(0, 1 << 64, changed, dtype=np.uint64)
        x, y = np.unique(a), np.unique(np.concatenate([b, random.integers(0, 1 << 64, 300, dtype=np.uint64)]))
        true = jaccard(x, y)
        errors.append((signature(x) == signature(y)).mean() - true)
        left, right = datasketch.MinHash(128), datasketch.MinHash(128)
        left.update_batch([v.tobytes() for v in x])
        right.update_batch([v.tobytes() for v in y])
        reference.append(left.jaccard(right) - true)
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 1.25 * np.std(reference)


@pytest.mark.parametrize("size", [40, 150, 2000])
@pytest.mark.parametrize("chinese", [False, True])
def test_planted_near_duplicates_are_found_and_hardly_anything_else(tmp_path, size, chinese):
    random = np.random.default_rng(size)
    texts, truth = [], {}

    def join(units):
        if not chinese:
            return " ".join(units)
        return "".join(chr(0x4E00 + int(unit[1:]) % 3000) if unit[0] == "w" else "龙" for unit in units)

    for _ in range(150):
        base = words(random, size)
        texts.append(join(base))
        for edits in random.integers(1, max(2, size // 20), 2):
            texts.append(join(edited(random, base, edits)))
    sets = [oracle(text) for text in texts]
    for i in range(len(texts)):
        first = i - i % 3
        overlaps = (len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for j in range(first, i))
        truth[i] = max(overlaps, default=0.0)
    keeper = search(texts, tmp_path)
    due = [i for i in truth if truth[i] >= 0.8]
    assert len(due) >= 50
    assert np.mean([keeper[i] >= 0 for i in due]) >= 0.95
    removed = np.flatnonzero(keeper >= 0)
    false = [i for i in removed
             if len(sets[i] & sets[keeper[i]]) / len(sets[i] | sets[keeper[i]]) < 0.8]
    assert len(false) <= 0.01 * len(texts)
    assert all(keeper[keeper[i]] == -1 and keeper[i] < i for i in removed)   # what it repeats stays


def test_a_chain_of_small_changes_does_not_remove_its_far_end(tmp_path):
    random = np.random.default_rng(3)
    base = words(random, 600)
    chain = [base]
    for step in range(8):
        chain.append([*chain[-1][:step * 60], *words(random, 40), *chain[-1][step * 60 + 40:]])
    texts = [" ".join(units) for units in chain]
    sets = [oracle(text) for text in texts]
    keeper = search(texts, tmp_path)
    kept = np.flatnonzero(keeper < 0)
    assert 1 < len(kept) < len(texts)
    for i in np.flatnonzero(keeper >= 0):
        assert len(sets[i] & sets[keeper[i]]) / len(sets[i] | sets[keeper[i]]) >= 0.8


def test_texts_that_differ_only_in_signs_stay(tmp_path):
    assert (search(["3 + 5 = 8", "3 - 5 = 8", "斗拱", "斗", "x" * 500, "y" * 500], tmp_path) == -1).all()
    assert search(["a  b\nc", "A b c"], tmp_path).tolist() == [-1, 0]


def test_equal_texts_up_to_space_and_composition_are_exact_duplicates(tmp_path):
    texts = ["café au lait", "unique", " cafe\u0301 \t au\nlait ", "Café au lait", "unique"]
    digests = np.frombuffer(b"".join(map(digest, texts)), np.uint64).reshape(-1, 2)
    assert exact_duplicates(digests, tmp_path / "keeper").tolist() == [-1, -1, 0, -1, 1]
    clash = np.array([[7, 1], [7, 2], [7, 1], [7, 2]], np.uint64)   # half a digest alike is not enough
    assert exact_duplicates(clash, tmp_path / "keeper").tolist() == [-1, -1, 0, 1]


@given(st.lists(st.integers(0, 20), max_size=60), st.integers(1, 70))
def test_groups_of_equal_keys_do_not_depend_on_slices(values, at_once):
    keys = np.array(values, np.uint64)
    found = sorted(group.tolist() for group in equal_groups(keys, at_once=at_once))
    assert found == sorted([i for i, v in enumerate(values) if v == key]
                           for key in set(values) if values.count(key) > 1)


def test_banding_proposes_almost_every_pair_at_the_threshold():
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        rows = dedup.rows_per_band(threshold)
        assert 1 - (1 - threshold**rows) ** (128 // rows) >= 0.995
    assert dedup.rows_per_band(0.8) == 6


def test_where_a_keeper_is_removed_its_own_keeper_takes_over_or_the_document_comes_back():
    keeper = np.array([-1, 0, 1, 1, 3])
    dedup._follow(keeper, lambda i, j: (i, j) == (0, 2))
    assert keeper.tolist() == [-1, 0, 0, -1, 3]
