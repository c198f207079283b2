"""Training with rounded weights: its gradient against PyTorch's own, and what comes out of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_decoders import batches_of, tiny

from dougong.adapt.qat import FakeQuantised, QATConfig
from dougong.nn.quantized import dequantize, group_scale, quantize
from dougong.objectives.causal_lm import CausalLMConfig


@pytest.mark.parametrize("group", (8, None))
def test_value_and_gradient_are_those_of_pytorchs_fake_quantisation_at_8_bits(group):
    weight = torch.randn(12, 32)
    weight[:, ::7] *= 3
    mine, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    scale = group_scale(weight, 8, group)
    seed = torch.randn(12, 32)
    FakeQuantised.apply(mine, 8, group).backward(seed)
    rows = theirs.reshape(-1, group or 32)
    reference = torch.fake_quantize_per_channel_affine(rows, scale.flatten(), torch.zeros(len(rows), dtype=torch.int32),
                                                       0, -127, 127)
    reference.reshape(12, 32).backward(seed)
    value = FakeQuantised.apply(weight, 8, group)
    torch.testing.assert_close(value, reference.reshape(12, 32).detach(), rtol=2**-11, atol=1e-7)   # float16 scales
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)


def test_at_4_bits_no_gradient_comes_through_beyond_the_last_integer():
    weight = torch.tensor([[-8.0, 7.4, 7.6, 8.0, 0.2, -3.0]], requires_grad=True)     # scale 1: integers -8 to 7
    value = FakeQuantised.apply(weight, 4, None)
    reference = torch.fake_quantize_per_channel_affine(
        weight.detach().requires_grad_(), torch.ones(1), torch.zeros(1, dtype=torch.int32), 0, -8, 7)
    torch.testing.assert_close(value, reference)
    value.sum().backward()
    assert weight.grad.tolist() == [[1, 1, 0, 0, 1, 1]]


def test_weights_that_begin_at_zero_get_their_gradient():
    weight = torch.tensor([[0.0, 0.0, 1.0, -2.0]], requires_grad=True)
    FakeQuantised.apply(weight, 4, 2).sum().backward()
    assert weight.grad.tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("family", ("qwen3", "nano", "gpt2"))      # qwen3 and gpt2 are tied, nano has a head of its own
def test_the_gradient_of_every_weight_is_that_at_the_rounded_weights(family):
    model, (batch,) = tiny(family), batches_of(1)
    at_rounded = copy.deepcopy(model)
    QATConfig(bits=8, group=16).apply(model)
    QATConfig(bits=8, group=16).merge(at_rounded)
    losses = [CausalLMConfig().build().losses(m, batch).sums for m in (model, at_rounded)]
    for sums in losses:
        sum(sums.values()).backward()
    torch.testing.assert_close(losses[0], losses[1])
    for (name, mine), (_, theirs) in zip(model.named_parameters(), at_rounded.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("group", (8, 5, None))
@pytest.mark.parametrize("bits", (4, 8))
def test_what_is_merged_is_rounded_by_quantize_to_itself(bits, group):
    model, (batch,) = tiny(), batches_of(1)
    names = [name for name, _ in model.named_parameters()]
    section = QATConfig(bits=bits, group=group)
    section.apply(model)
    assert [name for name, _ in model.named_parameters()] == names
    trained = model(batch["tokens"]).detach()
    section.merge(model)
    assert type(model.stem.tokens).__name__ == "Embedding"
    torch.testing.assert_close(model(batch["tokens"]), trained, rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            again = dequantize(*quantize(parameter.detach(), bits, group), group)
            assert torch.equal(again, parameter), name


def test_a_few_steps_lower_the_loss_of_the_rounded_model():
    torch.manual_seed(0)
    model, batches = tiny(), batches_of(1)
    section, objective = QATConfig(bits=4, group=8), CausalLMConfig().build()
    section.apply(model)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = sum(objective.losses(model, batches[0]).sums.values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    section.merge(model)
    with torch.no_grad():
        logits = model(batches[0]["tokens"])
    final = F.cross_entropy(logits.flatten(0, 1), batches[0]["targets"].flatten(), reduction="sum")
    assert final < 0.8 * losses[0]


def test_a_table_that_is_read_back_gets_the_gradient_of_both_uses():
    model, (batch,) = tiny(), batches_of(1)
    QATConfig(bits=8).apply(model)
    sum(CausalLMConfig().build().losses(model, batch).sums.values()).backward()
    table = dict(model.named_parameters())["stem.tokens.weight"]
    unseen = [token for token in range(61) if token not in batch["tokens"]]
    assert table.grad.abs().sum() > 0
    assert not unseen or table.grad[unseen].abs().sum() > 0      # of the head
