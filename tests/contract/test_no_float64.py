"""What sums in float64 asks no device for it that has none (MPS): a stand-in for one refuses the type."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dougong.adapt.calibrate import Moments
from dougong.adapt.gptq import solve
from dougong.adapt.lora import LoRAConfig, check_merge
from dougong.generate.sampling import SamplingConfig, probabilities
from dougong.models import FAMILIES
from dougong.objectives.losses import Losses
from dougong.recipes import held_out

MPS, to = torch.device("mps"), torch.Tensor.to


class OnMPS(torch.Tensor):
    """Numbers of the host that say they lie on MPS."""

    device = property(lambda self: MPS)

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def clone(self, **options):
        return super().clone(**options).as_subclass(OnMPS)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        for made in tree_leaves(result):
            if isinstance(made, OnMPS) and made.dtype == torch.float64:
                raise TypeError("the MPS framework doesn't support float64")
        return result


@pytest.fixture(autouse=True)
def to_mps(monkeypatch):
    def moved(x, *asked, **options):
        x = to(x, *[one for one in asked if one != MPS], **options) if asked != (MPS,) else x
        return x.as_subclass(OnMPS) if MPS in asked else x

    monkeypatch.setattr(torch.Tensor, "to", moved)


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}])
def test_the_law_of_the_next_token(settings):
    x_BV, config = torch.randn(3, 50) * 3, SamplingConfig(**settings)
    law_BV = probabilities(x_BV.as_subclass(OnMPS), config)
    assert type(law_BV) is torch.Tensor and torch.equal(law_BV, probabilities(x_BV, config))


def test_losses_of_held_out_rows():
    loss = torch.tensor(1.5).as_subclass(OnMPS)
    assert held_out._sums(Losses({"generator": loss, "discriminator": loss}, {"accuracy": loss})) == {
        "loss": 3.0, "accuracy": 1.5}


@pytest.fixture
def parts_of_their_own():
    """`Module.cpu` puts new parameters into a module, as `copy_` cannot change what a stand-in is."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize(("kind", "base"), [("lora", "float"), ("dora", "float"), ("lora", "int8"), ("dora", "int4")])
def test_merged_adapters(kind, base, parts_of_their_own):
    model = FAMILIES["qwen3"](vocab_size=31, context=16, dim=32, num_layers=1, num_heads=2).build()
    model.initialise(0)
    LoRAConfig(kind=kind, rank=2, base=base).apply(model, seed=0)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    expected = check_merge(model)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(parameter.data.as_subclass(OnMPS), requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.as_subclass(OnMPS)
    assert check_merge(model) == expected
    assert all(type(parameter) is OnMPS for parameter in model.parameters()), "the model stays where it was"


def test_columns_that_make_up_for_the_rounding_of_others():
    weight, x = torch.randn(6, 32), torch.randn(100, 32)
    found = []
    for kind in (torch.Tensor, OnMPS):
        moments = Moments.of(32, x.device)
        moments.add(x)
        moments.products = moments.products.as_subclass(kind)
        found.append(solve(weight.as_subclass(kind), moments, 4, 8))
    assert all(type(part) is OnMPS for part in found[1])
    assert all(torch.equal(mine.cpu(), expected) for mine, expected in zip(found[1], found[0]))
