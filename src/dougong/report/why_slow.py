"""Where the time of a run went: by phase, by process, over time, and in single slow steps. Numbers only."""

import statistics
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from dougong.core.events import BETWEEN_STEPS, IN_STEP
from dougong.report.numbers import is_number

SLOW_TIMES = 3.0
"""a step that takes this many times the median is listed"""
_OWN = ("data", "forward", *BETWEEN_STEPS)
"""phases in which nobody waits for others, but for what a divided model exchanges in its forward"""
_WAITING = ("wait", "norm")
_LATE = 0.05
"""a process holds up the others if its own work takes this share of a step longer than the median process's"""
_LISTED = 12


@dataclass(frozen=True)
class SlowStep:
    """One step, or the mean of the `steps` that one event sums up. `rank` is None with one process."""

    step: int
    steps: int
    seconds: float
    times: float
    phase: str
    rank: int | None


@dataclass(frozen=True)
class Slow:
    """`phases`: seconds of process 0 over the whole run, largest first; `ranks`: mean seconds a step by phase, of the
    processes of the last attempt; `straggler`: {rank, late_s, phase, share, others_wait_s}; `early_s` and `late_s`:
    median seconds of the first and last quarter; `outliers_cost_s`: what all slow steps, listed or not, took beyond the
    median."""

    steps: int
    step_s: float
    phases: dict[str, float]
    ranks: dict[int, dict[str, float]]
    straggler: dict[str, Any] | None
    early_s: float
    late_s: float
    outliers: list[SlowStep] = field(default_factory=list)
    more_outliers: int = 0
    outliers_cost_s: float = 0.0
    mfu: float | None = None

    @property
    def total_s(self) -> float:
        return sum(self.phases.values())

    def share(self, *phases: str) -> float:
        return sum(self.phases.get(phase, 0.0) for phase in phases) / self.total_s if self.total_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Span:
    """The steps that one event sums up: mean seconds by phase. `place`, the same for all processes: the attempt, how
    often it had gone back, and the last step."""

    place: tuple[int, int, int]
    steps: int
    phases: dict[str, float]

    @property
    def step(self) -> int:
        return self.place[-1]

    @property
    def seconds(self) -> float:
        return sum(self.phases.get(phase, 0.0) for phase in IN_STEP)


def where_time_went(logs: dict[int, list[dict[str, Any]]]) -> Slow | None:
    """From the `step` events of each process; None where none has phases."""
    first = _spans(logs.get(0, []))
    if not first:
        return None
    began = max((event["time"] for event in logs[0] if event["event"] == "start"), default=0.0)
    now = {rank: _spans([event for event in events if event["event"] == "start" or event["time"] >= began])
           for rank, events in sorted(logs.items())}
    now = {rank: own for rank, own in now.items() if own} or {0: first}
    seconds = [span.seconds for span in first]
    usual = statistics.median(seconds)
    quarter = max(1, len(seconds) // 4)
    ranks = {rank: _mean(own) for rank, own in now.items()}
    outliers = _outliers({**now, 0: first})
    mfus = [event["mfu"] for event in logs[0] if is_number(event.get("mfu"))]
    total: dict[str, float] = {}
    for span in first:
        for phase, mean in span.phases.items():
            total[phase] = total.get(phase, 0.0) + mean * span.steps
    return Slow(steps=sum(span.steps for span in first), step_s=usual,
                phases=dict(sorted(total.items(), key=lambda item: -item[1])), ranks=ranks,
                straggler=_straggler(ranks, usual),
                early_s=statistics.median(seconds[1:quarter + 1] or seconds),
                late_s=statistics.median(seconds[-quarter:]),
                outliers=outliers[:_LISTED], more_outliers=max(0, len(outliers) - _LISTED),
                outliers_cost_s=sum((one.seconds - usual) * one.steps for one in outliers),
                mfu=statistics.median(mfus) if mfus else None)


def _spans(events: list[dict[str, Any]]) -> list[_Span]:
    found, before, rewinds = [], {}, Counter[int]()
    for event in events:
        if not is_number(event.get("step")):
            continue
        kind, attempt, step = event["event"], event["attempt"], event["step"]
        if kind == "start":
            before[attempt] = step
        elif kind == "rewind":      # the time of steps not told before it comes with the first that is told after it
            before[attempt] = event["to_step"] - (step - before.get(attempt, step))
            rewinds[attempt] += 1
        elif kind == "step" and isinstance(event.get("phases"), dict):
            steps = max(1, step - before.get(attempt, step - 1))
            before[attempt] = step
            phases = {name: value / steps for name, value in event["phases"].items() if is_number(value)}
            found.append(_Span((attempt, rewinds[attempt], step), steps, phases))
    return found


def _mean(spans: list[_Span]) -> dict[str, float]:
    """Mean seconds a step by phase; the first event, in which everything is made ready, left out."""
    counted = spans[1:] or spans
    steps = sum(span.steps for span in counted)
    names = dict.fromkeys(name for span in counted for name in span.phases)
    return {name: sum(span.phases.get(name, 0.0) * span.steps for span in counted) / steps for name in names}


def _straggler(ranks: dict[int, dict[str, float]], step_s: float) -> dict[str, Any] | None:
    """The process whose own work takes longest, if that makes the others wait noticeably."""
    if len(ranks) < 2 or not step_s:
        return None
    own = {rank: sum(phases.get(name, 0.0) for name in _OWN) for rank, phases in ranks.items()}
    slowest = max(own, key=lambda rank: own[rank])
    others = [rank for rank in own if rank != slowest]
    late = own[slowest] - statistics.median(own[rank] for rank in others)
    if late < _LATE * step_s:
        return None

    def excess(name: str) -> float:
        return ranks[slowest].get(name, 0.0) - statistics.median(ranks[rank].get(name, 0.0) for rank in others)

    waited = statistics.median(sum(ranks[rank].get(name, 0.0) for name in _WAITING) for rank in others)
    return {"rank": slowest, "late_s": late, "phase": max(_OWN, key=excess), "share": late / step_s,
            "others_wait_s": waited}


def _outliers(spans: dict[int, list[_Span]]) -> list[SlowStep]:
    """Steps of SLOW_TIMES the median, each with the phase (and process) that took most more than usual."""
    usual = {rank: {phase: statistics.median([span.phases.get(phase, 0.0) for span in own]) for phase in IN_STEP}
             for rank, own in spans.items()}
    by_place = {rank: {span.place: span for span in own} for rank, own in spans.items()}
    median = statistics.median(span.seconds for span in spans[0])
    found = []
    for span in spans[0]:
        if median and span.seconds >= SLOW_TIMES * median:
            here = [(own[span.place].phases.get(phase, 0.0) - usual[rank][phase], phase, rank)
                    for rank, own in by_place.items() if span.place in own for phase in IN_STEP]
            own = [one for one in here if one[1] not in _WAITING] or here
            longest = max(own)
            cause = longest if longest[0] >= 0.3 * (span.seconds - median) else max(here)
            found.append(SlowStep(span.step, span.steps, span.seconds, span.seconds / median, cause[1],
                                  cause[2] if len(spans) > 1 else None))
    return sorted(found, key=lambda one: -one.seconds)
