import numpy as np
import pytest
from scipy import stats

from dougong.evaluate.scores import NATS_PER_BIT, DocumentScores
from dougong.evaluate.statistics import (
    bootstrap_ratio,
    paired_difference,
    seed_spread,
    student_t_cdf,
    student_t_quantile,
    wilson_interval,
)


def scores(bits_per_byte, sizes, name="model"):
    sizes = np.asarray(sizes)
    return DocumentScores(name, [str(i) for i in range(len(sizes))], ["s"] * len(sizes),
                          np.asarray(bits_per_byte) * sizes * NATS_PER_BIT, sizes)


def test_the_bootstrap_of_a_mean_is_the_normal_interval():
    x = np.random.default_rng(0).exponential(size=3000)
    low, high = bootstrap_ratio(x, np.ones(3000), resamples=4000)
    half = 1.96 * x.std() / np.sqrt(3000)
    assert low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(x.mean() + half, abs=0.1 * half)


def test_the_interval_of_a_ratio_covers_the_truth_as_often_as_it_says():
    random, covered = np.random.default_rng(1), 0
    for trial in range(400):
        sizes = random.lognormal(5, 1, size=80)
        spent = sizes * random.normal(2.0, 0.4, size=80)
        low, high = bootstrap_ratio(spent, sizes, confidence=0.9, resamples=400, seed=trial)
        covered += low <= 2.0 <= high
    assert 0.84 <= covered / 400 <= 0.94


def test_the_same_seed_gives_the_same_interval_in_any_number_of_parts(monkeypatch):
    x, y = np.random.default_rng(2).random((2, 50))
    whole = bootstrap_ratio(x, y, seed=5)
    assert bootstrap_ratio(x, y, seed=5) == whole != bootstrap_ratio(x, y, seed=6)
    monkeypatch.setattr("dougong.evaluate.statistics._INDICES_AT_ONCE", 700)
    assert bootstrap_ratio(x, y, seed=5) == whole


def test_one_document_has_no_interval():
    assert bootstrap_ratio(np.ones(1), np.ones(1)) is None
    assert paired_difference(scores([1], [9]), scores([2], [9])) == (pytest.approx(-1), None)


def test_an_empty_document_says_nothing_of_the_spread():
    assert bootstrap_ratio(np.array([3.0, 0.0]), np.array([2.0, 0.0])) is None
    with_it = bootstrap_ratio(np.array([3.0, 0.0, 5.0]), np.array([2.0, 0.0, 2.0]))
    assert with_it == bootstrap_ratio(np.array([3.0, 5.0]), np.array([2.0, 2.0]))
    assert paired_difference(scores([1, 0], [9, 0]), scores([2, 0], [9, 0]))[1] is None


def test_pairing_shows_a_difference_that_is_small_beside_the_spread_of_documents():
    random = np.random.default_rng(3)
    hard = random.normal(2, 0.5, size=200)
    a = scores(hard, sizes := random.integers(100, 5000, size=200), "a")
    b = scores(hard + random.normal(0.02, 0.01, size=200), sizes, "b")
    difference, (low, high) = paired_difference(a, b)
    assert difference == pytest.approx(a.bits_per_byte - b.bits_per_byte) and low < difference < high < 0
    own = bootstrap_ratio(a.nats / NATS_PER_BIT, a.bytes)
    assert own[1] - own[0] > 5 * (high - low)
    assert paired_difference(b, a)[0] == -difference


def test_different_documents_cannot_be_paired():
    with pytest.raises(AssertionError, match="different documents"):
        paired_difference(scores([1, 1], [5, 6]), scores([1, 1], [5, 7]))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 30, 101])
def test_students_t_equals_scipy(degrees):
    for t in (0.0, 0.3, 1.7, 6.0):
        assert student_t_cdf(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), abs=1e-12)
    for p in (0.6, 0.95, 0.975, 0.9995):
        assert student_t_quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), rel=1e-8)


def test_spread_over_seeds_equals_scipy():
    values = [1.41, 1.39, 1.45, 1.40]
    spread = seed_spread(values)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert spread.interval == pytest.approx(expected) and spread.sd == pytest.approx(np.std(values, ddof=1))
    assert seed_spread([2.0]).interval is None and seed_spread([2.0]).sd is None


@pytest.mark.parametrize("successes, trials", [(0, 10), (10, 10), (443, 450), (1, 3)])
def test_wilson_equals_scipy(successes, trials):
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high))


def test_sources_add_up_to_the_whole():
    s = DocumentScores("m", ["a", "b", "c"], ["x", "y", "x"], np.array([1.0, 2.0, 3.0]), np.array([4, 5, 6]))
    rows = s.by_source()
    assert [(r["source"], r["documents"], r["bytes"]) for r in rows] == [("x", 2, 10), ("y", 1, 5)]
    assert sum(r["bits_per_byte"] * r["bytes"] for r in rows) / 15 == pytest.approx(s.bits_per_byte)
    assert s.bits_per_byte == pytest.approx(6 / np.log(2) / 15)
