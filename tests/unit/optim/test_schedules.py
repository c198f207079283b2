"""Schedules against their closed forms."""

import math

import pytest

from dougong.core.config import from_dict
from dougong.core.errors import ConfigError
from dougong.optim import SCHEDULES

TOTAL = 200


def curve(kind, **options):
    schedule = from_dict(SCHEDULES[kind], {"kind": kind, **options}).build(TOTAL)
    return [schedule(step) for step in range(TOTAL)]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_warm_up_rises_linearly_to_the_full_rate(kind):
    factors = curve(kind, warmup=20)
    assert factors[:20] == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert factors[20] == 1.0
    assert max(factors) == 1.0 and min(factors) > 0


@pytest.mark.parametrize("kind,height", [
    ("linear", lambda p: 1 - p), ("cosine", lambda p: 0.5 + 0.5 * math.cos(math.pi * p))])
def test_decay_follows_the_formula_down_to_the_floor(kind, height):
    factors = curve(kind, warmup=0.1, floor=0.2)
    for step in range(20, TOTAL):
        assert factors[step] == pytest.approx(0.2 + 0.8 * height((step - 20) / 180))
    schedule = SCHEDULES[kind](warmup=0.1, floor=0.2).build(TOTAL)
    assert schedule(TOTAL) == pytest.approx(0.2) and schedule(10 * TOTAL) == pytest.approx(0.2)


@pytest.mark.parametrize("shape,power", [("linear", 1), ("sqrt", 0.5)])
def test_wsd_holds_then_decays(shape, power):
    factors = curve("wsd", warmup=10, decay=0.25, floor=0.1, shape=shape)
    assert set(factors[10:151]) == {1.0}
    for step in range(150, TOTAL):
        assert factors[step] == pytest.approx(0.1 + 0.9 * (1 - ((step - 150) / 50) ** power))


def test_constant_stays():
    assert set(curve("constant")) == {1.0}


def test_an_integer_counts_steps_and_a_float_is_a_fraction():
    assert curve("linear", warmup=1)[0] == 1.0
    assert curve("linear", warmup=1.0)[0] == pytest.approx(1 / TOTAL)


def test_spans_longer_than_the_run_are_refused():
    with pytest.raises(ConfigError, match="longer than the run"):
        SCHEDULES["linear"](warmup=TOTAL + 1).build(TOTAL)
    with pytest.raises(ConfigError, match="do not fit"):
        SCHEDULES["wsd"](warmup=0.5, decay=0.6).build(TOTAL)


@pytest.mark.parametrize("total", range(1, 12))
@pytest.mark.parametrize("warmup, decay", [(0.5, 0.5), (0.3, 0.7), (0.1, 0.9), (0.25, 0.75), (0, 1.0)])
def test_fractions_that_fit_fit_a_run_of_any_length(warmup, decay, total):
    schedule = SCHEDULES["wsd"](warmup=warmup, decay=decay).build(total)
    assert all(0 < schedule(step) <= 1 for step in range(total))
