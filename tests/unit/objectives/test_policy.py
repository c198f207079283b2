"""The policy gradient against autograd's own, and what a sample counts."""

import pytest
import torch
from preference_models import VOCABULARY, model

from dougong.data.batch import Batch
from dougong.objectives.policy import FIGURES, GRPOConfig, RejectionConfig


def samples(rows=6, length=9):
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCABULARY, (rows, length + 1), generator=draw)
    weight = torch.zeros(rows, length, dtype=torch.float64)
    for row in range(rows):
        weight[row, 2:length - row % 4] = 1
    return Batch(tokens=ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous(), weight=weight,
                 advantage=torch.randn(rows, generator=draw, dtype=torch.float64),
                 **{name: torch.full((rows,), 0.25, dtype=torch.float64) for name in FIGURES})


def test_the_gradient_is_that_of_advantage_times_log_probability_over_tokens():
    made, batch = model(), samples()
    objective = GRPOConfig().build()
    ours = objective.losses(made, batch).sums["model"] / objective.weight(batch)
    logp = made(batch["tokens"]).log_softmax(-1).gather(-1, batch["targets"][..., None])[..., 0]
    advantage = batch["advantage"][:, None].expand_as(logp)
    mask = batch["weight"].bool()
    theirs = -(advantage[mask] * logp[mask]).sum() / mask.sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    parameters = list(made.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_samples_of_advantage_one_are_learned_like_given_text():
    from dougong.objectives.causal_lm import CausalLMConfig

    made, batch = model(), samples()
    batch = Batch(**{**batch, "advantage": torch.ones(6, dtype=torch.float64)})
    ours = RejectionConfig().build().losses(made, batch).sums["model"]
    theirs = CausalLMConfig().build().losses(made, batch).sums["model"]
    parameters = list(made.parameters())
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_micro_batches_add_up_and_figures_come_back_as_they_were():
    made, batch = model(), samples()
    objective = GRPOConfig().build()
    whole, parts = objective.losses(made, batch), [objective.losses(made, part) for part in batch.split(4)]
    parameters = list(made.parameters())
    for a, b in zip(torch.autograd.grad(whole.sums["model"], parameters),
                    torch.autograd.grad(sum(p.sums["model"] for p in parts), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for name in FIGURES:
        assert float(sum(p.metrics[name] for p in parts)) / objective.weight(batch) == pytest.approx(0.25)


def test_grpo_centres_each_group_does_not_scale_it_and_leaves_out_those_that_agree():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1], [10.0, 0.0, 10.0, 0.0]])
    advantage, kept = GRPOConfig().advantages(rewards)
    torch.testing.assert_close(advantage[0], torch.tensor([0.75, -0.25, -0.25, -0.25]))
    torch.testing.assert_close(advantage[2], torch.tensor([5.0, -5.0, 5.0, -5.0]))
    assert kept.tolist() == [[True] * 4, [False] * 4, [True] * 4]


def test_rejection_keeps_what_passes():
    rewards = torch.tensor([[1.0, 0.0, 0.5, 2.0], [0.0, 0.0, 0.0, 0.0]])
    advantage, kept = RejectionConfig().advantages(rewards)
    assert kept.tolist() == [[True, False, False, True], [False] * 4] and (advantage == 1).all()
    assert RejectionConfig(passes=0.5).advantages(rewards)[1].tolist() == [[True, False, True, True], [False] * 4]
