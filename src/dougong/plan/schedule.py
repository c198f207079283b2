"""Pipeline bubbles and micro-batches in flight, from the order of work that torch's own schedules give each process."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from dougong.parallel.stages import num_stages, process_of

SCHEDULES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B", "looped_bfs": "LoopedBFS",
             "interleaved_zb": "InterleavedZeroBubble", "zbv": "ZBVZeroBubble", "dualpipev": "DualPipeV"}

_ALL_FORWARDS_FIRST = ("gpipe", "looped_bfs")
_STEADY = 4
"""micro-batches for each process from which a schedule only repeats itself: filling and draining it take as long"""
_COST = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
_NAMES = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
"""forward; whole backward; its part for the input; its part for the weights: in forwards of one stage"""


@dataclass(frozen=True)
class Pipeline:
    """`bubble`: share of the time in which a process waits; `in_flight[r]`: forwards whose backward is still to come
    that process r holds of each of its stages, at every moment that no other exceeds in all of them."""

    bubble: float
    in_flight: tuple[tuple[tuple[int, ...], ...], ...]


@cache
def pipeline(schedule: str, processes: int, micro_batches: int) -> Pipeline:
    """Runs the schedule's table with stages of equal cost and no time for messages. Raises ValueError, from torch, for
    a number of micro-batches that the schedule cannot use."""
    stages = num_stages(processes, schedule) // processes
    if micro_batches > (few := _STEADY * processes) and micro_batches % processes == 0:
        short = pipeline(schedule, processes, few)
        idle = short.bubble / (1 - short.bubble) * 3.0 * few * stages
        held = short.in_flight if schedule not in _ALL_FORWARDS_FIRST else (((micro_batches,) * stages,),) * processes
        return Pipeline(idle / (idle + 3.0 * micro_batches * stages), held)
    order = _order(schedule, processes, micro_batches, stages)
    finish = _simulate(order, processes * stages)
    work = 3.0 * micro_batches * stages      # one forward and two for the backward, each stage
    return Pipeline(1 - work / max(finish), tuple(_in_flight(order[rank]) for rank in range(processes)))


def _order(schedule: str, processes: int, micro_batches: int, stages: int) -> dict[int, list[Any]]:
    """What each process does, in order, as torch's actions."""
    from torch import nn
    from torch.distributed.pipelining import schedules

    known: Any = getattr(schedules, f"Schedule{SCHEDULES[schedule]}")
    mine = [SimpleNamespace(group_size=processes, group_rank=0, num_stages=processes * stages, group=None,
                            stage_index=index, has_backward=True, submod=nn.Identity(), device="cpu",
                            is_first=index == 0, is_last=index == processes * stages - 1,
                            stage_index_to_group_rank=None)
            for index in range(processes * stages) if process_of(index, processes, schedule) == 0]
    built = known(mine if stages > 1 else mine[0], micro_batches, loss_fn=lambda *_: None)
    order = {rank: [action for action in actions if action is not None] for rank, actions in
             (built.pipeline_order or {}).items()}
    return {rank: _renumbered(actions, micro_batches) for rank, actions in order.items()} if schedule == "1f1b" \
        else order


def _renumbered(actions: list[Any], micro_batches: int) -> list[Any]:
    """Torch's table of 1F1B, which is only drawn and not followed, begins the last stage at micro-batch 1 and warms up
    with more forwards than a short step has: here they are those that its run does."""
    forwards, kept = 0, []
    for action in actions:
        if _kind(action) == "F":
            if forwards == micro_batches:
                continue
            action, forwards = action._replace(microbatch_index=forwards), forwards + 1
        kept.append(action)
    return kept


def _kind(action: Any) -> str:
    """F, B, I or W; other entries (reducing gradients) cost nothing and are "-"."""
    return _NAMES.get(action.computation_type.name, "-")


def _simulate(order: dict[int, list[Any]], stages: int) -> list[float]:
    """When each process is done: it works its list in order, and waits for what an entry needs."""
    done: dict[tuple[str, int, int], float] = {}
    clock, place = [0.0] * len(order), [0] * len(order)
    left = sum(len(actions) for actions in order.values())
    while left:
        before = left
        for rank, actions in order.items():
            while place[rank] < len(actions) and (ready := _ready(actions[place[rank]], stages, done)) is not None:
                clock[rank] = max(clock[rank], ready)
                clock[rank] = _do(actions[place[rank]], clock[rank], done)
                place[rank] += 1
                left -= 1
        assert left < before, "the schedule waits for itself"
    return clock


def _parts(action: Any) -> list[Any]:
    """An overlapped forward and backward is two entries."""
    return list(action.sub_actions) if getattr(action, "sub_actions", None) else [action]


def _ready(action: Any, stages: int, done: dict[tuple[str, int, int], float]) -> float | None:
    """When what an entry needs is there; None: not yet known."""
    times = [0.0]
    for part in _parts(action):
        kind, stage, batch = _kind(part), part.stage_index, part.microbatch_index
        needs = []
        if kind == "F" and stage > 0:
            needs = [("F", stage - 1, batch)]
        elif kind in "BI" and stage < stages - 1:
            needs = [("I", stage + 1, batch)]
        elif kind in "BI":
            needs = [("F", stage, batch)]
        elif kind == "W":
            needs = [("I", stage, batch)]
        for need in needs:
            if need not in done:
                return None
            times.append(done[need])
    return max(times)


def _do(action: Any, clock: float, done: dict[tuple[str, int, int], float]) -> float:
    for part in _parts(action):
        kind = _kind(part)
        clock += _COST.get(kind, 0.0)
        if kind in _COST:
            done["I" if kind == "B" else kind, part.stage_index, part.microbatch_index] = clock
    return clock


def _in_flight(actions: list[Any]) -> tuple[tuple[int, ...], ...]:
    """Stage-forwards held at once, of each of the process's stages, at the moments that no other exceeds in all; what
    the weights' gradients still need is held until they are computed."""
    parts = [part for action in actions for part in _parts(action)]
    stages = sorted({part.stage_index for part in parts if _kind(part) == "F"})
    held: set[tuple[int, int]] = set()
    now: Counter[int] = Counter()
    moments: set[tuple[int, ...]] = set()
    for part in parts:
        key, kind = (part.stage_index, part.microbatch_index), _kind(part)
        if kind == "F":
            held.add(key)
            now[part.stage_index] += 1
            moments.add(tuple(now[stage] for stage in stages))
        elif kind in ("B", "W") and key in held:
            held.discard(key)
            now[part.stage_index] -= 1
    return largest(moments)


def largest(moments: Iterable[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Those of one or two numbers that none exceeds in all."""
    found: list[tuple[int, ...]] = []
    for moment in sorted(moments, reverse=True):
        if not found or moment[-1] > found[-1][-1]:
            found.append(moment)
    return tuple(found)
