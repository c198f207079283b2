from collections import Counter, defaultdict

import numpy as np
import pytest

from dougong.core.errors import ConfigError, DataError
from dougong.evaluate import kneser_ney
from dougong.evaluate.kneser_ney import KneserNey

TEXTS = [b"the cat sat on the mat; the cat ate", b"a cat, a hat, a bat and the rat", b"", b"th",
         bytes(range(256)), "斗拱 the 斗拱".encode() * 3, b"the the the the that this those " * 4]


class Reference:
    """The same model written straight from the formulas, with dictionaries."""

    def __init__(self, order, texts):
        self.order = order
        self.counts = [None, *(Counter() for _ in range(order))]
        for text in texts:
            symbols = (None,) * (order - 1) + tuple(text)
            for i in range(order - 1, len(symbols)):
                self.counts[order][symbols[i - order + 1:i + 1]] += 1
        for k in range(order - 1, 0, -1):
            before = defaultdict(set)
            for ngram in self.counts[k + 1]:
                before[ngram[1:]].add(ngram[0])
            self.counts[k] = Counter({ngram: len(symbols) for ngram, symbols in before.items()})
        self.discounts = [None, *(self._discounts(self.counts[k]) for k in range(1, order + 1))]

    def _discounts(self, counts):
        n = Counter(counts.values())
        if all(n[i] for i in (1, 2, 3, 4)):
            y = n[1] / (n[1] + 2 * n[2])
            discounts = {i: i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)}
            if min(discounts.values()) > 0:
                return discounts
        return {1: 0.75, 2: 0.75, 3: 0.75}

    def probability(self, history, byte, k):
        if k == 0:
            return 1 / 256
        history = history[len(history) - (k - 1):]
        lower = self.probability(history, byte, k - 1)
        following = {ngram[-1]: c for ngram, c in self.counts[k].items() if ngram[:-1] == history}
        if not following:
            return lower
        total, discount = sum(following.values()), self.discounts[k]
        weight = sum(discount[min(c, 3)] for c in following.values()) / total
        c = following.get(byte, 0)
        return (c - discount[min(c, 3)] if c else 0) / total + weight * lower

    def nats(self, text):
        symbols = (None,) * (self.order - 1) + tuple(text)
        return -sum(np.log(self.probability(symbols[:i], symbols[i], self.order))
                    for i in range(self.order - 1, len(symbols)))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_every_probability_equals_a_straightforward_implementation(order):
    slow, fast = Reference(order, TEXTS), KneserNey(order).fit(TEXTS)
    unseen = [b"the hat sat", b"\x00zq", b"", b"t", "拱the".encode()]
    nats = fast.nats(unseen)
    assert np.isfinite(nats).all() and nats == pytest.approx([slow.nats(text) for text in unseen], rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 5, 7])
def test_probabilities_are_positive_and_sum_to_one(order):
    model = KneserNey(order).fit(TEXTS)
    for context in (b"", b"t", b"the", b"the ca", b"never \xff\xfe seen", b"a cat, a"):
        p = model.distribution(context)
        assert p.shape == (256,) and (p > 0).all() and p.sum() == pytest.approx(1, abs=1e-12)


def test_discounts_are_those_of_the_formula_where_counts_allow():
    counts = np.repeat([1, 2, 3, 4, 9], [40, 20, 10, 5, 3])
    y = 40 / 80
    assert kneser_ney._discounts(counts) == pytest.approx([0, 1 - 2 * y * 20 / 40, 2 - 3 * y * 10 / 20,
                                                           3 - 4 * y * 5 / 10])
    for odd in (counts[counts < 4], np.repeat([1, 2, 3, 4], [10, 1, 20, 5])):
        assert kneser_ney._discounts(odd).tolist() == [0, 0.75, 0.75, 0.75]


def test_chunks_change_nothing(monkeypatch):
    whole = KneserNey(5).fit(TEXTS)
    expected = whole.nats(TEXTS)
    monkeypatch.setattr(kneser_ney, "_CHUNK_BYTES", 20)
    assert np.array_equal(KneserNey(5).fit(iter(TEXTS)).nats(TEXTS), expected)


def test_documents_do_not_see_each_other():
    model = KneserNey(5).fit(TEXTS)
    together, alone = model.nats(TEXTS), [model.nats([text])[0] for text in TEXTS]
    assert together == pytest.approx(alone, rel=1e-12) and together[2] == 0


def test_it_learns_a_markov_source_to_its_entropy():
    random, p = np.random.default_rng(0), 0.9
    flips = random.random(40_000) > p
    text = (np.cumsum(flips) % 2 + 97).astype(np.uint8).tobytes()
    bits = KneserNey(3).fit([text[:30_000]]).nats([text[30_000:]])[0] / np.log(2) / 10_000
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
    assert entropy * 0.97 < bits < entropy * 1.03


def test_nothing_to_learn_and_impossible_orders_are_refused():
    with pytest.raises(DataError):
        KneserNey(5).fit([b""])
    for order in (0, 8):
        with pytest.raises(ConfigError):
            KneserNey(order)
