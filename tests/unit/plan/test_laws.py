"""Laws of scale: the numbers their papers print, repeated text, and the marks outside the fitted ranges."""

import math

import pytest

from dougong.plan import laws
from dougong.plan.laws import (
    BATCH_LAWS,
    CHINCHILLA,
    DATA_CONSTRAINED,
    DEEPSEEK,
    KAPLAN,
    NANOCHAT,
    RATE_LAWS,
    Range,
    worth,
)


def test_the_refit_gives_gophers_compute_to_chinchillas_shape():
    parameters, tokens = CHINCHILLA.optimum(5.76e23)
    assert parameters == pytest.approx(72e9, rel=0.01) and tokens == pytest.approx(1.33e12, rel=0.01)


@pytest.mark.parametrize(("parameters", "tokens", "loss"), [
    (6.34e9, 242e9, 2.2256440889984477), (8.67e9, 178e9, 2.2269634075087867)])
def test_repeated_text_costs_what_the_authors_code_says(parameters, tokens, loss):
    """The two models of Muennighoff et al.'s figure 1, 25B unique tokens: values printed in their repository."""
    assert DATA_CONSTRAINED.loss(parameters, tokens, 25e9) == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("law", [CHINCHILLA, DATA_CONSTRAINED])
@pytest.mark.parametrize("flops", [1e19, 1e21, 1e24])
def test_no_other_split_of_the_compute_is_better_than_the_optimum(law, flops):
    parameters, tokens = law.optimum(flops)
    assert 6 * parameters * tokens == pytest.approx(flops)
    least = law.loss(parameters, tokens)
    for factor in (0.8, 0.97, 1.03, 1.25):
        assert law.loss(parameters * factor, tokens / factor) > least


def test_four_passes_are_nearly_fresh_text_and_forty_are_not():
    assert worth(1.0, 1.0, 15.39) == 1.0 and worth(0.3, 1.0, 15.39) == pytest.approx(0.3)
    assert worth(4.0, 1.0, 15.39) > 0.9 * 4
    assert worth(40.0, 1.0, 15.39) < 0.4 * 40
    assert worth(1e9, 1.0, 15.39) == pytest.approx(16.39)


def test_text_used_again_is_worth_less_but_never_harms():
    fresh = DATA_CONSTRAINED.loss(1e9, 100e9)
    repeated = [DATA_CONSTRAINED.loss(1e9, 100e9, unique) for unique in (100e9, 25e9, 5e9, 1e9)]
    assert repeated[0] == pytest.approx(fresh) and repeated == sorted(repeated)


def test_a_law_of_fresh_text_is_not_used_for_repeated_text():
    with pytest.raises(AssertionError, match="repeated"):
        CHINCHILLA.loss(1e9, 100e9, 25e9)


@pytest.mark.parametrize(("parameters", "tokens", "rate", "batch"), [
    (7e9, 2e12, 4.2e-4, 2304 * 4096), (67e9, 2e12, 3.2e-4, 4608 * 4096)])
def test_deepseeks_laws_give_the_settings_of_deepseeks_models(parameters, tokens, rate, batch):
    """DeepSeek LLM 7B and 67B, table 2 of arXiv:2401.02954."""
    [found_rate] = [law.figure(parameters, tokens).value for law in RATE_LAWS if "DeepSeek" in law.name]
    [found_batch] = [law.figure(parameters, tokens).value for law in BATCH_LAWS if "DeepSeek" in law.name]
    assert found_rate == pytest.approx(rate, rel=0.03) and found_batch == pytest.approx(batch, rel=0.05)


def test_the_other_allocations_say_what_they_are_known_for():
    assert KAPLAN.optimum(laws.PETAFLOP_DAY)[0] == pytest.approx(1.3e9)
    parameters, tokens = NANOCHAT.optimum(1e19)
    assert tokens / parameters == pytest.approx(12)
    assert 15 < DEEPSEEK.optimum(1e21)[1] / DEEPSEEK.optimum(1e21)[0] < 25


def test_olmos_ladder_passes_through_its_anchor():
    assert RATE_LAWS[2].figure(108e6, 1e10).value == pytest.approx(0.00235)
    assert BATCH_LAWS[2].figure(108e6, 1e10).value == pytest.approx(327_680)


def test_outside_the_fitted_range_a_figure_says_so_and_by_how_much():
    inside, below, above = (RATE_LAWS[0].figure(n, 10e9) for n in (500e6, 6e6, 11e9))
    assert inside.extrapolated == ()
    assert "10.0 times below" in below.extrapolated[0] and "10.0 times above" in above.extrapolated[0]
    assert "60M to 1.1B" in below.fitted and "2503.04715" in below.source


def test_a_loss_law_judges_size_text_and_compute():
    assert CHINCHILLA.outside(1e9, 20e9) == ()
    said = CHINCHILLA.outside(1e6, 4e6)
    assert len(said) == 3 and all("below" in one for one in said)


def test_edges_of_a_range_belong_to_it():
    edge = Range("tokens", 1e6, 1e9)
    assert not edge.judge(1e6) and not edge.judge(1e9) and edge.judge(0.0)


@pytest.mark.parametrize(("value", "text"), [(2.1e6, "2.1M"), (40e9, "40B"), (9.232e20, "9.2e20"), (999.9e6, "1B"),
                                             (0.02, "0.02"), (7, "7"), (4096, "4.1K")])
def test_amounts_are_short(value, text):
    assert laws.amount(value) == text


def test_every_law_names_a_source_and_a_range():
    for law in (CHINCHILLA, DATA_CONSTRAINED, *laws.OTHER_ALLOCATIONS, *BATCH_LAWS, *RATE_LAWS):
        assert law.source and law.ranges and all(math.isfinite(one.high) and one.low < one.high for one in law.ranges)


@pytest.mark.parametrize(("flops", "ratio"), [(1e12, 4), (1e14, 4), (1e16, 48**0.5), (1e18, 12), (5e18, 12)])
def test_below_the_laws_the_tokens_per_parameter_go_from_four_to_nanochats_twelve(flops, ratio):
    parameters, tokens = laws.small_scale(flops).optimum(flops)
    assert tokens / parameters == pytest.approx(ratio, rel=1e-3)


def test_below_the_laws_too_repeated_text_makes_models_smaller():
    law = laws.small_scale(1e14)

    def best(unique):
        return min((law.loss(n, 1e14 / 6 / n, unique), n) for n in (10**(5 + i / 20) for i in range(60)))[1]

    assert best(math.inf) == pytest.approx(law.optimum(1e14)[0], rel=0.15)
    assert best(2e5) < 0.8 * best(math.inf)
