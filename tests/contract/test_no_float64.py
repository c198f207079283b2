"""What sums in float64 asks no device for it that has none (MPS): a stand-in for one refuses the type."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from dougong.generate.sampling import SamplingConfig, probabilities
from dougong.objectives.losses import Losses
from dougong.recipes import held_out

MPS, to = torch.device("mps"), torch.Tensor.to


class OnMPS(torch.Tensor):
    """Numbers of the host that say they lie on MPS."""

    device = property(lambda self: MPS)

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        for made in tree_leaves(result):
            if isinstance(made, OnMPS) and made.dtype == torch.float64:
                raise TypeError("the MPS framework doesn't support float64")
        return result


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}])
def test_the_law_of_the_next_token(settings, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: x.as_subclass(OnMPS) if MPS in a else to(x, *a, **k))
    x_BV, config = torch.randn(3, 50) * 3, SamplingConfig(**settings)
    law_BV = probabilities(x_BV.as_subclass(OnMPS), config)
    assert type(law_BV) is torch.Tensor and torch.equal(law_BV, probabilities(x_BV, config))


def test_losses_of_held_out_rows():
    loss = torch.tensor(1.5).as_subclass(OnMPS)
    assert held_out._sums(Losses({"generator": loss, "discriminator": loss}, {"accuracy": loss})) == {
        "loss": 3.0, "accuracy": 1.5}
