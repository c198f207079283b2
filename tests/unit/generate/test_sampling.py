import math

import pytest
import torch
from scipy.stats import chisquare
from transformers.generation import logits_process as reference

from dougong.core.config import from_dict
from dougong.core.errors import CheckpointError, ConfigError
from dougong.generate.sampling import (
    Draws,
    SamplingConfig,
    adjust,
    choose,
    log_probabilities,
    penalise_repetition,
    pick,
    probabilities,
    truncate,
)


def logits(rows=4, vocabulary=50):
    return torch.randn(rows, vocabulary) * 3


def test_top_k_equals_transformers():
    x = logits()
    ours = truncate(x, SamplingConfig(top_k=7))
    assert torch.equal(ours, reference.TopKLogitsWarper(7)(None, x)) and (ours > -torch.inf).sum() == 4 * 7


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_equals_transformers(top_p):
    x = logits()
    assert torch.equal(truncate(x, SamplingConfig(top_p=top_p)), reference.TopPLogitsWarper(top_p)(None, x))


@pytest.mark.parametrize("min_p", [0.01, 0.3, 1.0])
def test_min_p_equals_transformers(min_p):
    x = logits()
    assert torch.equal(truncate(x, SamplingConfig(min_p=min_p)), reference.MinPLogitsWarper(min_p)(None, x))


def test_all_truncations_together_equal_transformers_in_its_order():
    for seed in range(20):
        torch.manual_seed(seed)
        x = logits()
        expected = x
        for warper in (reference.TopKLogitsWarper(20), reference.TopPLogitsWarper(0.8),
                       reference.MinPLogitsWarper(0.1)):
            expected = warper(None, expected)
        assert torch.equal(truncate(x, SamplingConfig(top_k=20, top_p=0.8, min_p=0.1)), expected)


def test_repetition_penalty_equals_transformers():
    x, tokens = logits(), torch.randint(0, 50, (4, 9))
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, tokens, True)
    expected = reference.RepetitionPenaltyLogitsProcessor(1.3)(tokens, x)
    assert torch.equal(penalise_repetition(x, seen, 1.3), expected) and not torch.equal(x, expected)


def test_frequency_and_presence_penalties_and_bias_are_openais():
    """mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, and the bias added."""
    x, counts = logits(2, 6), torch.tensor([[0.0, 1, 2, 0, 0, 3], [5, 0, 0, 0, 1, 0]])
    config = SamplingConfig(frequency_penalty=0.5, presence_penalty=-1.5, logit_bias=((2, -100.0), (4, 7.5), (99, 1.0)))
    for row, held, ours in zip(x.tolist(), counts.tolist(), adjust(x, config, None, counts).tolist()):
        bias = [0, 0, -100, 0, 7.5, 0]
        theirs = [row[j] - 0.5 * held[j] + 1.5 * (held[j] > 0) + bias[j] for j in range(6)]
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("bias", [((-1, 2.0),), ((1, 101.0),)])
def test_a_bias_that_means_nothing_is_refused(bias):
    with pytest.raises(ConfigError, match="logit_bias"):
        SamplingConfig(logit_bias=bias)


def test_tokens_of_equal_logit_are_kept_or_dropped_together():
    x = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]])
    for settings in (SamplingConfig(top_k=2), SamplingConfig(top_p=0.8)):
        assert (truncate(x, settings) > -torch.inf).tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("top_k, top_p", [(2, 0.6), (50, 0.9), (20, 0.3), (50, 0.999)])
def test_top_p_of_what_top_k_left_counts_all_that_are_as_likely_as_the_kth(top_k, top_p):
    """bf16 logits are often equal. Transformers drops some of equal ones, by their place; the least that it keeps is
    the least kept here."""
    coarse = torch.cat([torch.tensor([3.0]), torch.full((8191,), 2.0)])
    x = torch.cat([coarse[None], (torch.randn(30, 8192) * 2).bfloat16().float()])
    theirs = reference.TopPLogitsWarper(top_p)(None, reference.TopKLogitsWarper(top_k)(None, x))
    least = theirs.masked_fill(theirs == -torch.inf, torch.inf).amin(-1, keepdim=True)
    ours = truncate(x, SamplingConfig(top_k=top_k, top_p=top_p))
    assert torch.equal(ours > -torch.inf, x >= least)


def test_greedy_ties_take_the_lowest_id():
    x = torch.zeros(3, 5000)
    x[0, [17, 3, 4999]] = 2.0
    x[1, [4998, 4999]] = 2.0
    assert choose(x, SamplingConfig(temperature=0)).tolist() == [3, 4998, 0]


@pytest.mark.parametrize("settings", [
    SamplingConfig(), SamplingConfig(temperature=0.5), SamplingConfig(temperature=2.0, top_k=5),
    SamplingConfig(top_p=0.7), SamplingConfig(min_p=0.15, temperature=1.5)])
def test_draws_follow_the_distribution(settings):
    x, count = torch.randn(1, 12) * 1.5, 20_000
    wanted = x / settings.temperature
    wanted = truncate(wanted, settings).double().softmax(-1)[0]
    draws = Draws(5)
    drawn = choose(x.expand(count, -1), settings, [draws.next() for _ in range(count)])
    observed = torch.bincount(drawn, minlength=12).double()
    possible = wanted > 0
    assert observed[~possible].sum() == 0
    assert chisquare(observed[possible], wanted[possible] * count).pvalue > 1e-3


def test_a_uniform_at_either_end_picks_a_possible_token():
    x = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    assert choose(x, SamplingConfig(), [0.0]).tolist() == [1]
    assert choose(x, SamplingConfig(), [1 - 2**-53]).tolist() == [2]


def test_a_tiny_temperature_is_greedy_and_finite():
    x = logits() * 100
    assert torch.equal(choose(x, SamplingConfig(temperature=1e-30), [0.999] * 4), x.argmax(-1))


@pytest.mark.parametrize("settings", [{"temperature": 1e-46}, {"temperature": 1e300}, {"repetition_penalty": 1e-45},
                                      {"repetition_penalty": 1e-300}, {"repetition_penalty": 1e300}])
def test_numbers_beyond_float32_still_choose_a_possible_token(settings):
    x, config = torch.tensor([[1.0, -torch.inf, 0.0, 2.0, -3.0]]), SamplingConfig(**settings)
    adjusted = adjust(x, config, torch.ones_like(x, dtype=torch.bool))
    assert probabilities(adjusted, config).sum().item() == pytest.approx(1)
    for uniform in (0.0, 0.5, 1 - 2**-53):
        assert pick(adjusted, config, [uniform]).item() in (0, 2, 3, 4)
    if "temperature" in settings and settings["temperature"] < 1:
        assert pick(adjusted, config, [0.5]).item() == 3


def test_not_finite_logits_are_refused():
    x = logits()
    x[2, 7] = math.nan
    for settings in (SamplingConfig(temperature=0), SamplingConfig()):
        with pytest.raises(CheckpointError, match="not finite"):
            choose(x, settings, [0.5] * 4)


def test_log_probabilities_are_those_of_the_model():
    x = logits()
    of_chosen, ranked = log_probabilities(x, torch.tensor([3, 1, 4, 1]), 3)
    expected = x.double().log_softmax(-1)
    assert of_chosen == pytest.approx([expected[b, t].item() for b, t in enumerate([3, 1, 4, 1])], abs=1e-5)
    for row, pairs in zip(expected, ranked):
        assert [id for id, _ in pairs] == row.topk(3).indices.tolist()
        assert [value for _, value in pairs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-5)


@pytest.mark.parametrize("values", [
    {"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}, {"max_tokens": 0},
    {"repetition_penalty": 0}, {"n": 0}, {"stop": [""]}, {"temperature": 0, "top_k": 5},
    {"temperature": 0, "n": 2}, {"long_prompt": "guess"}, {"topk": 5}])
def test_impossible_and_idle_settings_are_refused(values):
    with pytest.raises(ConfigError):
        from_dict(SamplingConfig, values)
