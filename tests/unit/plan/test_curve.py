"""The curve from a few small runs: it finds what made them, says how sure it is, and lets runs overrule its priors."""

import numpy as np
import pytest

from dougong.plan.curve import DRIFT, SmallRun, effective_tokens, fit_curve

CEILING = 3.7


def truth(parameters, tokens, *, E=0.5, alpha=0.35, beta=0.37):
    h = 0.06 * (parameters / 2e6) ** -alpha + 0.18 * (tokens / 6e6) ** -beta
    return E + (CEILING - E) * h / (1 + h)


def probe(seed, noise=0.006, **law):
    """Four runs as the probe makes them: three sizes for one time, the smallest for half of it."""
    random = np.random.default_rng(seed)
    places = [(0.25e6, 4e6), (0.5e6, 2.2e6), (1e6, 1.4e6), (0.25e6, 2e6)]
    return [SmallRun(n, d, truth(n, d, **law) * np.exp(noise * random.standard_normal())) for n, d in places]


def test_most_intervals_hold_what_a_ten_times_longer_run_reaches():
    held = []
    for seed in range(8):
        law = {"E": 0.3 + 0.07 * seed, "alpha": 0.3 + 0.02 * seed, "beta": 0.45 - 0.02 * seed}
        _, (low, high) = fit_curve(probe(seed, **law), ceiling=CEILING, seed=seed).predict(3e6, 12e6)
        held.append(low <= truth(3e6, 12e6, **law) <= high)
        assert high / low < 2, "an interval that holds everything says nothing"
    assert sum(held) >= 7


def test_inside_the_runs_the_curve_is_within_their_scatter():
    curve = fit_curve(probe(0), ceiling=CEILING)
    middle, _ = curve.predict(0.4e6, 2.5e6)
    assert middle == pytest.approx(truth(0.4e6, 2.5e6), rel=0.03)


def test_the_further_from_the_runs_the_wider_the_interval():
    curve = fit_curve(probe(1), ceiling=CEILING)
    widths = [high / low for _, (low, high) in (curve.predict(n, d) for n, d in ((1e6, 2e6), (2e6, 8e6), (8e6, 32e6)))]
    assert widths == sorted(widths)


def test_larger_models_and_more_text_are_never_worse():
    curve = fit_curve(probe(2), ceiling=CEILING)
    assert (np.diff([curve.loss(n, 5e6) for n in (1e5, 1e6, 1e7)], axis=0) < 0).all()
    assert (np.diff([curve.loss(1e6, d) for d in (1e5, 1e6, 1e7)], axis=0) < 0).all()
    assert (curve.loss(1.0, 1.0) <= CEILING + 1e-9).all()


def test_many_runs_overrule_the_priors():
    places = [(n, d) for n in (2e5, 6e5, 2e6, 6e6) for d in (1e6, 4e6, 16e6, 64e6)]
    runs = [SmallRun(n, d, truth(n, d, alpha=0.8, beta=0.9)) for n, d in places]
    numbers = fit_curve(runs, ceiling=CEILING).numbers
    assert numbers["alpha"][1] == pytest.approx(0.8, rel=0.15) and numbers["beta"][1] == pytest.approx(0.9, rel=0.15)
    assert numbers["E"][1] == pytest.approx(0.5, rel=0.1)


def test_repeated_text_counts_less():
    curve = fit_curve(probe(3), ceiling=CEILING, unique=20e6)
    once, often = (np.median(curve.loss(1e6, 40e6, unique)) for unique in (np.inf, 1e6))
    assert often > once
    assert effective_tokens(5e6, 9e6) == 5e6 and effective_tokens(50e6, 5e6) < 50e6


def test_the_same_runs_give_the_same_curve():
    first, again = (fit_curve(probe(4), ceiling=CEILING).predict(2e6, 8e6) for _ in range(2))
    assert first == again


def test_the_interval_is_that_of_one_run_not_of_the_curve():
    """Many runs determine the curve; what a single one reaches still scatters as they did."""
    random = np.random.default_rng(5)
    places = [(n, d) for n in (2e5, 6e5, 2e6, 6e6) for d in (1e6, 4e6, 16e6, 64e6)]
    runs = [SmallRun(n, d, truth(n, d) * np.exp(0.03 * random.standard_normal())) for n, d in places]
    _, (low, high) = fit_curve(runs, ceiling=CEILING).predict(1e6, 10e6)
    assert 2 * 1.5 * 0.03 < np.log(high / low) < 2 * 2.8 * 0.03


@pytest.mark.parametrize("place", [(6e6, 64e6 * 32), (6e6 * 32, 64e6)])
def test_the_form_itself_is_not_trusted_far_beyond_the_runs(place):
    runs = [SmallRun(n, d, truth(n, d)) for n in (2e5, 6e5, 2e6, 6e6) for d in (1e6, 4e6, 16e6, 64e6)]
    _, (low, high) = fit_curve(runs, ceiling=CEILING).predict(*place)
    assert np.log(high / low) > 2 * 1.9 * 5 * DRIFT
