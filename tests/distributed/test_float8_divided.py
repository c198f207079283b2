"""Layers multiplied in float8, divided. A tensor's scale is that of what one process holds, so layouts round otherwise:
the gradients of each must be as near to those of one process as float8 is to float32."""

from typing import Any

import pytest
import torch
from matrix import Case, Trace, decoder, divided, reference
from processes import run_processes

from dougong.core.config import replace
from dougong.nn.feed_forward import SwiGLUConfig
from dougong.runtime.layout import LayoutConfig

CASE = Case(model=decoder(num_layers=4, dim=64, feed_forward=SwiGLUConfig(ffn_dim=128), init_std=0.02,
                          embedding_std=0.1), float8=True, micro_batches=2, steps=1, rows=16, packed=True)
NOISE = 0.2
"""of a gradient by float8, against its length: queries and keys, whose gradients are small differences, have 0.12"""


def distances(expected: Trace, trace: Trace) -> dict[str, float]:
    """|Δ| / |g| of every gradient that this process holds."""
    want, got = expected[0].gradients, trace[0].gradients
    return {name: float((got[name] - want[name]).norm() / want[name].norm()) for name in got}


@pytest.fixture(scope="module")
def exact() -> Trace:
    return reference(replace(CASE, float8=False))


@pytest.fixture(scope="module")
def whole() -> Trace:
    return reference(CASE)


def test_one_process_is_near_the_exact_gradient_and_not_equal_to_it(exact, whole):
    found = distances(exact, whole)
    assert 0.01 < max(found.values()) < NOISE
    assert whole[0].metrics["loss"] == pytest.approx(exact[0].metrics["loss"], rel=5e-3)


@pytest.mark.parametrize("layout", [
    LayoutConfig(replicate=2), LayoutConfig(shard=2), LayoutConfig(tensor=2), LayoutConfig(context=2),
    LayoutConfig(pipeline=2, schedule="1f1b"), LayoutConfig(pipeline=2, schedule="zbv"),
    LayoutConfig(shard=2, tensor=2),
], ids=str)
def test_divided_gradients_are_as_near(exact, layout):
    traces: list[Any] = run_processes(layout.processes, divided, CASE, layout)
    assert {name for trace in traces for name in trace[0].gradients} == set(exact[0].gradients)
    for trace in traces:
        found = distances(exact, trace)
        assert 0.01 < max(found.values()) < NOISE, found
        assert trace[0].metrics["loss"] == pytest.approx(exact[0].metrics["loss"], rel=5e-3)
        assert all(torch.isfinite(weight).all() for weight in trace[0].weights.values())
