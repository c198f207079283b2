"""One lagged copy for averages, targets and teachers."""

import pytest
import torch
from tiny_training import TinyLM
from torch import nn

from dougong.train.shadow import Shadow


def walk(shadow, model, steps):
    """Random walk of the weights; returns their history."""
    history = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        shadow.update(model, step)
        history.append(model.weight.detach().clone())
    return history


def test_an_average_follows_its_formula():
    model = nn.Linear(3, 2)
    expected, shadow = model.weight.detach().clone(), Shadow(model, every=2, tau=0.1, debias=False)
    for step, weight in enumerate(walk(shadow, model, 10), 1):
        if step % 2 == 0:
            expected = 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(shadow.tensors["weight"], expected)


def test_without_bias_the_start_is_a_plain_mean():
    model = nn.Linear(3, 2)
    start, shadow = model.weight.detach().clone(), Shadow(model, tau=0.001)
    history = walk(shadow, model, 9)
    torch.testing.assert_close(shadow.tensors["weight"], torch.stack([start, *history]).mean(0))


def test_a_target_network_is_an_exact_old_copy():
    model = nn.Linear(3, 2)
    shadow = Shadow(model, every=4, tau=1.0)
    history = walk(shadow, model, 7)
    torch.testing.assert_close(shadow.tensors["weight"], history[3], rtol=0, atol=0)
    x = torch.randn(2, 3)
    torch.testing.assert_close(shadow(model, x), nn.functional.linear(x, history[3], shadow.tensors["bias"]))
    assert torch.equal(model.weight, history[-1])


def test_swapped_weights_are_the_average_and_come_back_after_an_error():
    model = TinyLM()
    shadow = Shadow(model, tau=0.5)
    with torch.no_grad():
        model.embedding.weight.add_(1.0)
    own, average = model.embedding.weight.detach().clone(), shadow.tensors["embedding.weight"].clone()
    with pytest.raises(RuntimeError), shadow.swapped(model):
        assert torch.equal(model.embedding.weight, average)
        assert torch.equal(model.head.weight, average)      # tied: one tensor under two names
        raise RuntimeError
    assert torch.equal(model.embedding.weight, own)
    assert torch.equal(shadow.tensors["embedding.weight"], average)


def test_batch_statistics_follow_and_counters_are_copied():
    model = nn.BatchNorm1d(2)
    shadow = Shadow(model, tau=1.0)
    model(torch.randn(8, 2))
    shadow.update(model, 1)
    assert torch.equal(shadow.tensors["running_mean"], model.running_mean)
    assert shadow.tensors["num_batches_tracked"] == 1
