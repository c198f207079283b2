"""Pruning: what is of no use goes first, and what stays is an ordinary model."""

import copy

import pytest
import torch
from tiny_decoders import batches_of, tiny

from dougong.adapt.prune import Shape, cut, mean_loss, measure, prune, shapes_within, whole_shape
from dougong.core.config import from_dict, to_dict
from dougong.core.errors import ConfigError
from dougong.models import FAMILIES, count
from dougong.models.heads import add_value_head


def _useless(model, layer=0, channels=(3, 7, 8), group=1):
    """Makes these parts write nothing; the model of which they are cut must then compute the same."""
    block = model.stack[str(layer)]
    attention = block.attention
    width = attention.num_heads // attention.num_kv_heads * attention.head_dim
    with torch.no_grad():
        block.feed_forward.down.weight[:, list(channels)] = 0
        attention.output.weight[:, group * width:(group + 1) * width] = 0
    return model


@pytest.mark.parametrize("family", ("qwen3", "llama"))
def test_what_writes_nothing_is_cut_without_any_change(family):
    model, batches = tiny(family, ffn_dim=48), batches_of(2)
    for layer in (0, 1):
        _useless(model, layer, channels=range(5 * layer, 5 * layer + 16), group=layer)
    importance = measure(model, batches)
    made = cut(model, Shape(layers=2, groups=1, channels=32), importance)
    tokens = batches[0]["tokens"]
    torch.testing.assert_close(made(tokens), model(tokens), rtol=1e-4, atol=1e-4)
    assert (made.config.num_heads, made.config.num_kv_heads, made.config.head_dim, made.config.ffn_dim) == (2, 1, 8, 32)


def test_a_layer_that_adds_nothing_goes_first():
    model, batches = tiny(num_layers=3), batches_of(2)
    with torch.no_grad():
        model.stack["1"].attention.output.weight.zero_()
        model.stack["1"].feed_forward.down.weight.zero_()
    importance = measure(model, batches)
    assert importance.layers_L.abs().argmin() == 1 and importance.layers_L[1].abs() < 1e-2
    made = cut(model, Shape(2, 2, 48), importance)
    torch.testing.assert_close(made(batches[0]["tokens"]), model(batches[0]["tokens"]), rtol=1e-5, atol=1e-5)


def test_importance_is_the_change_of_loss_to_first_order():
    """Against the loss with one channel turned up and down a little: d loss / d turn = Σ a ∂loss/∂a."""
    model, (batch,) = tiny(), batches_of(1, rows=1)
    importance, tokens = measure(model, [batch]).channels_LF, float(batch["weight"].sum())
    for channel in (0, 5, 11):
        losses = []
        for turn in (0.95, 1.05):
            turned = copy.deepcopy(model)
            with torch.no_grad():
                turned.stack["1"].feed_forward.down.weight[:, channel] *= turn
            losses.append(mean_loss(turned, [batch]))
        change = abs(losses[1] - losses[0]) * tokens / 0.1
        torch.testing.assert_close(importance[1, channel].item(), change, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("family", ("qwen3", "llama", "gpt2", "nano"))
def test_a_pruned_model_is_an_ordinary_one_of_at_most_the_parameters_asked_for(family):
    model, batches = tiny(family, num_layers=3, ffn_dim=128, vocab_size=30), batches_of(2, vocab_size=30)
    total = count.parameters(model.config)["total"]
    found = prune(model, batches, ratio=0.3)
    again = from_dict(FAMILIES[family], to_dict(found.model.config)).build()
    again.load_state_dict(found.model.state_dict())
    assert found.parameters == count.parameters(found.model.config)["total"] <= 0.7 * total
    assert found.parameters > 0.5 * total
    torch.testing.assert_close(found.loss, mean_loss(found.model, batches))


def test_a_head_for_values_stays_as_it_is():
    model, batches = tiny(num_layers=3, ffn_dim=128), batches_of(2)
    add_value_head(model, 2)
    torch.nn.init.normal_(model.value.weight)
    made = prune(model, batches, ratio=0.3).model
    torch.testing.assert_close(made.value.weight, model.value.weight, rtol=0, atol=0)


def test_shapes_leave_out_those_that_another_one_holds():
    model = tiny(num_layers=4, ffn_dim=128)
    shapes, whole = shapes_within(model, 10**9), whole_shape(model)
    assert shapes == [whole]
    fitting = shapes_within(model, int(0.7 * count.parameters(model.config)["total"]))
    assert len(fitting) > 1 and len(set(fitting)) == len(fitting)


def test_what_cannot_be_pruned_says_why():
    model, batches = tiny(), batches_of(1)
    with pytest.raises(ConfigError, match="share of the parameters"):
        prune(model, batches, ratio=1.5)
    with pytest.raises(ConfigError, match="no shape"):
        prune(model, batches, ratio=0.95)
    with pytest.raises(ConfigError, match="qwen3, llama, gpt2 or nano"):
        prune(model.config.decoder().build(), batches, ratio=0.3)
