"""DoRA's lengths and directions; what adapters are to training and to files is tested in `unit/adapt`."""

import pytest
import torch

from dougong.nn.linear import Linear
from dougong.nn.lora import DoRALinear


@pytest.mark.parametrize("moved", [0.0, 0.3])
def test_a_row_of_zeros_stays_one_in_every_way_of_computing(moved):
    frozen = Linear(8, 4)
    with torch.no_grad():
        frozen.weight.normal_()
        frozen.weight[2] = 0
    part = DoRALinear.over(frozen, 2, factor=1.0, dropout=0.0)
    with torch.no_grad():
        part.lora_a.normal_()
        part.lora_b.fill_(moved)[2] = 0
    part.reset_magnitude()
    x = torch.randn(5, 8)
    y = part(x)
    y.square().sum().backward()
    assert not y[:, 2].any() and all(p.grad.isfinite().all() for p in (part.lora_a, part.lora_b, part.magnitude))
    for other in (part.exactly(x), part.merged()(x)):
        torch.testing.assert_close(other, y, rtol=1e-5, atol=1e-5)
    if not moved:
        torch.testing.assert_close(y, frozen(x), rtol=1e-5, atol=1e-5)
