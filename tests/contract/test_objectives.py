"""Every objective of the table: sums add over rows, weights come from the batch, metrics have no gradient."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dougong.core.errors import DataError
from dougong.data.batch import Batch
from dougong.objectives import OBJECTIVES


class Token(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=9)
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.value = nn.Linear(4, 2)

    def hidden(self, tokens_BT, *, segment_BT=None, cache=None):
        return self.embedding(tokens_BT).tanh()

    def head_parameters(self):
        return list(self.head.parameters())


class Judge(Token):
    """With a head of one output."""

    def __init__(self):
        super().__init__()
        self.value = nn.Linear(4, 1)


class Game(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(noise_dim=3)
        self.generator, self.discriminator = nn.Linear(3, 4), nn.Linear(4, 1)


def case(kind):
    """(model, batch) in float64."""
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    inputs = torch.randn(6, 4, dtype=torch.float64)
    pairs = {"tokens": torch.randint(9, (6, 2, 5)), "targets": torch.randint(9, (6, 2, 5)),
             "weight": torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0]).expand(6, 2, 5).clone(), "reference": torch.randn(6, 2)}
    rows = {name: value[:, 0] for name, value in pairs.items() if name != "reference"}
    model, fields = {
        "causal_lm": lambda: (Token(), {"tokens": torch.randint(9, (6, 5)),
                                        "targets": torch.randint(9, (6, 5)),
                                        "weight": torch.rand(6, 5)}),
        "distil": lambda: (Token(), {"tokens": torch.randint(9, (6, 5)), "targets": torch.randint(9, (6, 5)),
                                     "weight": torch.rand(6, 5), "teacher_ids": torch.rand(6, 5, 9).argsort()[..., :3],
                                     "teacher_log_p": torch.randn(6, 5, 4).log_softmax(-1)}),
        "classify": lambda: (nn.Linear(4, 3),
                             {"pixels": inputs, "labels": torch.randint(3, (6,)), "weight": weight}),
        "regression": lambda: (nn.Linear(4, 2), {"features": inputs, "targets": torch.randn(6, 2).double(),
                                                 "weight": weight}),
        "gan": lambda: (Game(), {"pixels": inputs}),
        "dpo": lambda: (Token(), pairs),
        "ipo": lambda: (Token(), pairs),
        "orpo": lambda: (Token(), pairs),
        "kto": lambda: (Token(), {**pairs, "label": torch.tensor([1, 0, 1, 1, 0, 0])}),
        "reward": lambda: (Judge(), pairs),
        "classify_text": lambda: (Token(), {"tokens": rows["tokens"], "places": torch.randint(5, (6,)),
                                            "labels": torch.randint(2, (6,))}),
        "grpo": lambda: (Token(), {**rows, "advantage": torch.randn(6)}),
        "rejection": lambda: (Token(), {**rows, "advantage": torch.ones(6)}),
    }[kind]()
    return model.double(), Batch(**fields)


def gradient(model, losses):
    total = sum(losses.sums.values())
    found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)     # not every loss uses every head
    assert any(g is not None for g in found)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_sums_are_finite_scalars_and_metrics_have_no_gradient(kind):
    model, batch = case(kind)
    losses = OBJECTIVES[kind]().build().losses(model, batch)
    for value in losses.sums.values():
        assert value.shape == () and value.isfinite() and value.requires_grad
    for value in losses.metrics.values():
        assert value.shape == () and value.isfinite() and not value.requires_grad
    assert "loss" in losses.metrics


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_additive_objectives_add_over_rows(kind):
    model, batch = case(kind)
    objective = OBJECTIVES[kind]().build()
    if objective.not_additive:
        assert kind in ("gan", "kto") and len(objective.not_additive) > 20
        return
    whole = objective.losses(model, batch)
    parts = [objective.losses(model, part) for part in batch.split(2)]
    torch.testing.assert_close(sum(gradient(model, part) for part in parts), gradient(model, whole),
                               rtol=1e-12, atol=1e-12)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name] for part in parts), value, rtol=1e-6, atol=1e-6)
    assert objective.weight(batch) == pytest.approx(sum(objective.weight(part) for part in batch.split(2)),
                                                    rel=1e-12)


@pytest.mark.parametrize("kind", ["causal_lm", "distil", "classify", "regression"])
def test_a_row_without_weight_changes_nothing(kind):
    model, batch = case(kind)
    weight = torch.ones_like(batch["weight"])
    weight[1] = 0
    objective = OBJECTIVES[kind]().build()
    field = {"causal_lm": "tokens", "distil": "tokens", "classify": "pixels", "regression": "features"}[kind]
    other = batch[field].clone()
    other[1] = 0
    a = objective.losses(model, Batch(**{**batch, "weight": weight}))
    b = objective.losses(model, Batch(**{**batch, "weight": weight, field: other}))
    torch.testing.assert_close(gradient(model, a), gradient(model, b), rtol=1e-12, atol=1e-14)
    assert objective.weight(Batch(**{**batch, "weight": weight})) == weight.sum()


def test_classify_is_torchs_cross_entropy_with_smoothing():
    model, batch = case("classify")
    losses = OBJECTIVES["classify"](label_smoothing=0.1).build().losses(model, batch)
    logits = model(batch["pixels"])
    each = F.cross_entropy(logits, batch["labels"], reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(losses.sums["model"], (each * batch["weight"]).sum())
    plain = F.cross_entropy(logits, batch["labels"], reduction="none")
    torch.testing.assert_close(losses.metrics["loss"], (plain * batch["weight"]).sum().detach())


def test_regressions_gradient_is_prediction_minus_target():
    model, batch = case("regression")
    OBJECTIVES["regression"]().build().losses(model, batch).sums["model"].backward()
    error = (model(batch["features"]) - batch["targets"]) * batch["weight"][:, None]
    torch.testing.assert_close(model.weight.grad, error.mT @ batch["features"])


def test_regression_refuses_shapes_that_would_broadcast():
    model, batch = case("regression")
    with pytest.raises(DataError, match="targets are"):
        OBJECTIVES["regression"]().build().losses(model,
                                                  Batch(**{**batch, "targets": torch.zeros(6, 1).double()}))


def test_gan_losses_are_the_papers():
    model, batch = case("gan")
    torch.manual_seed(3)
    losses = OBJECTIVES["gan"]().build().losses(model, batch)
    torch.manual_seed(3)
    fake = model.generator(torch.randn(6, 3, dtype=torch.float64))
    real, made = model.discriminator(batch["pixels"]).sigmoid(), model.discriminator(fake).sigmoid()
    torch.testing.assert_close(losses.sums["discriminator"], -(real.log() + (1 - made).log()).sum())
    torch.testing.assert_close(losses.sums["generator"], -made.log().sum())
