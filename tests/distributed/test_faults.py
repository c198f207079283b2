"""Faults planted on purpose: the matrix must see each of them, and what a loss alone would not have seen."""

from typing import Any

import pytest
import torch
from matrix import ADAMW, Case, Trace, check, divided, reference
from processes import run_processes
from torch import nn

from dougong.core.config import replace
from dougong.parallel.data import GradientSums
from dougong.runtime.layout import LayoutConfig
from dougong.runtime.parts import local

CASE = Case(steps=1)
MANY_STEPS = Case(steps=20, clip_norm=0.0)


def _doubled(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(2)


def _one_element(model: nn.Module) -> None:
    gradient = local(model.get_parameter("stack.1.feed_forward.down.weight").grad)
    gradient.view(-1)[0] += 0.01 * gradient.abs().max()


def _not_a_number(model: nn.Module) -> None:
    if torch.distributed.get_rank() == 1:
        local(model.get_parameter("norm.weight").grad).view(-1)[0] = float("nan")


def _exchanged(model: nn.Module) -> None:
    """Each process gets the other's part of one gradient."""
    gradient = local(model.get_parameter("stack.0.attention.query.weight").grad)
    parts = [torch.empty_like(gradient) for _ in range(2)]
    torch.distributed.all_gather(parts, gradient)
    gradient.copy_(parts[1 - torch.distributed.get_rank()])


def _without_sums(case: Case, layout: LayoutConfig) -> Trace:
    GradientSums.__call__ = lambda self, model: None      # type: ignore[method-assign]  # in a forked process
    return divided(case, layout)


def _mean_instead_of_sum(case: Case, layout: LayoutConfig) -> Trace:
    import dougong.parallel.data as data

    kept = data._sum_bucket

    def mean(group: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        bucket.buffer().div_(group.size())
        return kept(group, bucket)

    data._sum_bucket = mean
    return divided(case, layout)


@pytest.mark.parametrize(("fault", "layout", "seen"), [
    (_doubled, LayoutConfig(shard=2), "gradient of stack.0.attention.query.weight"),
    (_one_element, LayoutConfig(tensor=2), "gradient of stack.1.feed_forward.down.weight"),
    (_exchanged, LayoutConfig(shard=2), "gradient of stack.0.attention.query.weight"),
    (_not_a_number, LayoutConfig(replicate=2), "gradient of norm.weight: differs by nan"),
])
def test_planted_gradients_are_seen(fault, layout, seen):
    with pytest.raises(AssertionError, match=seen):
        check(reference(CASE), run_processes(layout.processes, divided, CASE, layout, fault))


def test_a_dropped_sum_is_seen_in_what_it_would_have_summed_and_nowhere_else():
    with pytest.raises(AssertionError) as found:
        check(reference(CASE), run_processes(2, _without_sums, CASE, LayoutConfig(tensor=2)))
    lines = [line for line in str(found.value).splitlines() if "gradient of" in line]
    assert lines and all("norm" in line for line in lines), found.value


def test_a_mean_where_a_sum_belongs_is_seen():
    with pytest.raises(AssertionError, match="gradient norm"):
        check(reference(CASE), run_processes(2, _mean_instead_of_sum, CASE, LayoutConfig(replicate=2)))


def test_missing_and_extra_names_are_seen():
    expected, trace = reference(CASE), reference(CASE)
    trace[0].gradients["other"] = trace[0].gradients.pop("norm.weight")
    with pytest.raises(AssertionError, match=r"missing \['norm.weight'\], extra \['other'\]"):
        check(expected, [trace])


def test_losses_alone_would_not_see_doubled_gradients():
    """AdamW divides by the size of the gradient: twenty losses differ by a millionth, in which no one sees a fault."""
    case = replace(MANY_STEPS, optimizer=replace(ADAMW, eps=1e-8))
    losses = [[step.metrics["loss"] for step in trace] for trace in
              (reference(case), run_processes(2, divided, case, LayoutConfig(replicate=2), _doubled)[0])]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    with pytest.raises(AssertionError, match="gradient norm"):
        check(reference(CASE), run_processes(2, divided, CASE, LayoutConfig(replicate=2), _doubled))
