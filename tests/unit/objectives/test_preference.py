"""DPO, IPO, KTO and ORPO against closed forms written down here, finite differences and micro-batches, in float64."""

import math

import pytest
import torch
from preference_models import VOCABULARY, model, pairs, plain_log_probs

from dougong.core.errors import ConfigError
from dougong.data.batch import Batch
from dougong.objectives import OBJECTIVES, token_log_probs
from dougong.objectives.kto import KTOConfig
from dougong.objectives.preference import DPOConfig, IPOConfig, ORPOConfig
from dougong.objectives.token_log_probs import row_log_probs
from dougong.train.step import check_additive


def dpo(logp, lengths, batch):
    r = logp - batch["reference"]
    p = torch.sigmoid(0.3 * (r[:, 0] - r[:, 1]))        # the probability that the preferred one is preferred
    return -(0.9 * p.log() + 0.1 * (1 - p).log()).sum()


def ipo(logp, lengths, batch):
    r = logp - batch["reference"]
    return ((r[:, 0] - r[:, 1] - 1 / (2 * 0.3)) ** 2).sum()


def ipo_per_token(logp, lengths, batch):
    r = (logp - batch["reference"]) / lengths
    return ((r[:, 0] - r[:, 1] - 1 / (2 * 0.3)) ** 2).sum()


def orpo(logp, lengths, batch):
    p = (logp / lengths).exp()
    odds = p / (1 - p)
    ratio = odds[:, 0] / odds[:, 1]
    return (-(p[:, 0].log()) - 0.3 * (ratio / (1 + ratio)).log()).sum()


def kto(logp, lengths, batch):
    r = logp - batch["reference"]
    z = max(0.0, float(r[:, 1].detach().mean()))
    good = 1.5 * (1 - torch.sigmoid(0.3 * (r[:, 0] - z)))
    bad = 0.5 * (1 - torch.sigmoid(0.3 * (z - r[:, 0])))
    return (batch["label"] * good + (1 - batch["label"]) * bad).sum()


CASES = {"dpo": (DPOConfig(beta=0.3, label_smoothing=0.1), dpo), "ipo": (IPOConfig(beta=0.3), ipo),
         "ipo per token": (IPOConfig(beta=0.3, per_token=True), ipo_per_token), "orpo": (ORPOConfig(beta=0.3), orpo),
         "kto": (KTOConfig(beta=0.3, desirable=1.5, undesirable=0.5), kto)}
additive = pytest.mark.parametrize("name", [name for name in CASES if name != "kto"])


def both(name, **settings):
    section, closed = CASES[name]
    made, batch = model(), pairs()
    ours = section.build().losses(made, batch).sums["model"]
    theirs = closed(plain_log_probs(made, batch), batch["weight"].sum(-1), batch)
    return made, ours, theirs


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_closed_form(name):
    made, ours, theirs = both(name)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    parameters = list(made.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_slope_of_the_loss(name):
    made, batch = model(), pairs()
    objective = CASES[name][0].build()
    loss = objective.losses(made, batch).sums["model"]
    parameter = made.stack["1"].attention.query.weight
    slope, = torch.autograd.grad(loss, parameter)
    direction = torch.randn_like(parameter)
    step, values = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(direction, alpha=sign * step)
            if name == "kto":       # its reference point is a constant in the gradient, so it is held here too
                values.append(_kto_at(made, batch, held=float(_kl(model(), batch).detach())))
            else:
                values.append(float(objective.losses(made, batch).sums["model"]))
            parameter.add_(direction, alpha=-sign * step)
    measured = (values[0] - values[1]) / (2 * step)
    assert measured == pytest.approx(float((slope * direction).sum()), rel=1e-5)


def _kl(made, batch):
    return (plain_log_probs(made, batch) - batch["reference"])[:, 1].mean().clamp(min=0)


def _kto_at(made, batch, *, held):
    r = (plain_log_probs(made, batch) - batch["reference"])[:, 0]
    good = 1.5 * (1 - torch.sigmoid(0.3 * (r - held)))
    bad = 0.5 * (1 - torch.sigmoid(0.3 * (held - r)))
    return float((batch["label"] * good + (1 - batch["label"]) * bad).sum())


@additive
def test_micro_batches_add_up_to_the_batch(name):
    made, batch = model(), pairs()
    objective = CASES[name][0].build()
    whole = objective.losses(made, batch)
    parts = [objective.losses(made, part) for part in batch.split(2)]
    assert sum(objective.weight(part) for part in batch.split(2)) == objective.weight(batch) == 5
    parameters = list(made.parameters())
    together = torch.autograd.grad(sum(part.sums["model"] for part in parts), parameters)
    for a, b in zip(torch.autograd.grad(whole.sums["model"], parameters), together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for metric, value in whole.metrics.items():
        torch.testing.assert_close(value, sum(part.metrics[metric] for part in parts), rtol=1e-9, atol=1e-12)


def test_kto_refuses_micro_batches_and_says_why():
    with pytest.raises(ConfigError, match="mean over the whole batch"):
        check_additive(model(), KTOConfig().build(), rows=8, micro_rows=4)


def test_at_the_start_dpo_knows_nothing_and_pulls_the_two_apart():
    made, batch = model(), pairs()
    batch = Batch(**{**batch, "reference": plain_log_probs(made, batch).detach()})
    found = DPOConfig().build().losses(made, batch)
    assert float(found.sums["model"]) == pytest.approx(5 * math.log(2), rel=1e-9)
    assert float(found.metrics["margin"]) == pytest.approx(0, abs=1e-9)
    logp = plain_log_probs(made, batch)
    found.sums["model"].backward()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter -= 1e-3 * parameter.grad
    moved = (plain_log_probs(made, batch) - logp).detach()
    assert float((moved[:, 0] - moved[:, 1]).sum()) > 0


def test_metrics_are_the_rewards_that_the_model_implies():
    made, batch = model(), pairs()
    metrics = DPOConfig(beta=0.5).build().losses(made, batch).metrics
    rewards = 0.5 * (plain_log_probs(made, batch) - batch["reference"]).detach()
    assert float(metrics["accuracy"]) == float((rewards[:, 0] > rewards[:, 1]).sum())
    torch.testing.assert_close(metrics["reward_chosen"], rewards[:, 0].sum())
    torch.testing.assert_close(metrics["margin"], (rewards[:, 0] - rewards[:, 1]).sum())


def test_orpo_stays_finite_where_the_model_is_certain():
    made, batch = model(dtype=torch.float32), pairs(dtype=torch.float32)
    with torch.no_grad():
        made.head.weight.mul_(1e4)
    loss = ORPOConfig().build().losses(made, batch).sums["model"]
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(made.parameters())))


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 10**9], ids=["many", "some", "one"])
def test_chunks_of_logits_change_nothing_and_are_all_that_exists(monkeypatch, chunk):
    monkeypatch.setattr(token_log_probs, "_LEAST_ROWS", 2)
    made, batch = model(), pairs()
    seen = []
    made.head.register_forward_hook(lambda _m, _i, out: seen.append(out.numel()))
    fields = [batch[name].flatten(0, 1) for name in ("tokens", "targets", "weight")]
    ours, lengths = row_log_probs(made, *fields, chunk_logits=chunk)
    theirs = plain_log_probs(made, batch).flatten()
    assert max(seen[:-1]) <= max(2 * VOCABULARY, chunk)
    assert sum(seen[:-1]) == VOCABULARY * int(batch["weight"].sum())     # prompts never reach the head
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lengths, fields[2].sum(-1))
    factor = torch.randn(len(ours), dtype=ours.dtype)
    parameters = list(made.parameters())
    for a, b in zip(torch.autograd.grad((factor * ours).sum(), parameters),
                    torch.autograd.grad((factor * theirs).sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_batch_without_any_reply_has_no_gradient_and_no_error():
    made, batch = model(), pairs()
    empty = Batch(**{**batch, "weight": torch.zeros_like(batch["weight"])})
    found = DPOConfig().build().losses(made, empty)
    assert all((g == 0).all() for g in torch.autograd.grad(found.sums["model"], list(made.parameters())))


def test_every_objective_is_found_by_its_kind():
    for section, _ in CASES.values():
        assert OBJECTIVES[section.kind] is type(section)
