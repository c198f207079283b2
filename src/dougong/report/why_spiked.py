"""What went wrong in a run and whose fault it was: skipped steps, faults, leaps, hangs, ways back. Numbers only."""

import math
import statistics
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from dougong.report.numbers import is_number
from dougong.train.config import SpikeConfig
from dougong.train.spikes import Spikes

_GREW = 3.0
"""a layer has grown when its gradient norm is this many times its own median"""
_TROUBLES = ("skip", "fault")
_SAME = ("event", "attempt", "step", "batch")
"""in which the events agree that several processes write of one step"""


@dataclass(frozen=True)
class Layer:
    """The layer whose gradient grew first, at which step, and how many times its usual norm (None: no number)."""

    name: str
    step: int
    times: float | None
    all_at_once: bool = False


@dataclass(frozen=True)
class Trouble:
    """One suspicious step. `kind`: "skip", "fault" (computed again and taken) or "leap" (seen in the events only, and
    taken). `ranks`: processes whose own loss changed between the two computations."""

    kind: str
    step: int
    reason: str
    batch: int | None = None
    verdict: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    layer: Layer | None = None
    ranks: list[int] = field(default_factory=list)

    @property
    def documents(self) -> list[str]:
        """Those of rows that stand out: no number, or twice the median row's loss; else of the worst row."""
        rows = [row for row in self.rows if _stands_out(row)] or self.rows[:1]
        return list(dict.fromkeys(name for row in rows for name in row.get("documents", [])))


@dataclass(frozen=True)
class Spiked:
    troubles: list[Trouble]
    rewinds: list[dict[str, Any]]
    hangs: list[dict[str, Any]]

    def of(self, kind: str) -> list[Trouble]:
        return [trouble for trouble in self.troubles if trouble.kind == kind]

    def to_dict(self) -> dict[str, Any]:
        troubles = [{**asdict(one), "documents": one.documents} for one in self.troubles]
        return {"troubles": troubles, "rewinds": self.rewinds, "hangs": self.hangs}


def what_went_wrong(logs: dict[int, list[dict[str, Any]]]) -> Spiked:
    """From the events of every process."""
    first = logs.get(0, [])
    told = {rank: [event for event in events if event["event"] in _TROUBLES] for rank, events in logs.items()}
    troubles = []
    for event, after in pairwise([*first, {}]):
        if event["event"] in _TROUBLES and is_number(event.get("step")):
            rows, ranks = _by_rank(told, event)
            troubles.append(Trouble(
                event["event"], event["step"], str(event.get("reason") or (event.get("fault") or {}).get("reason", "")),
                event.get("batch"), event.get("verdict"), rows,
                first_to_grow(after) if after.get("event") == "spike" else None, ranks))
    known = {trouble.step for trouble in troubles}
    troubles += [leap for leap in _leaps(first) if leap.step not in known]
    return Spiked(sorted(troubles, key=lambda one: one.step), _fields(first, "rewind"), _hangs(logs))


def first_to_grow(history: dict[str, Any]) -> Layer | None:
    """The first layer to exceed a few times its own median before the leap, from a `spike` event."""
    steps, layers = history.get("steps", []), history.get("layers", {})
    grown = []
    for name, norms in layers.items():
        values = [value if is_number(value) else math.inf for value in norms]
        usual = statistics.median([value for value in values[:-1] if math.isfinite(value)] or [math.nan])
        for place, value in enumerate(values):
            if value > _GREW * usual or not math.isfinite(value):
                grown.append((place, -value / usual if math.isfinite(value) and usual else -math.inf, name))
                break
    if not grown:
        return None
    place, growth, name = min(grown)
    together = len(grown) == len(layers) > 1 and all(one[:2] == (place, growth) for one in grown)
    return Layer(name, steps[place], -growth if math.isfinite(growth) else None, together)


def _by_rank(told: dict[int, list[dict[str, Any]]], event: dict[str, Any]) -> tuple[list[dict[str, Any]], list[int]]:
    """Suspicious rows of all processes, the worst first, and the processes whose own loss changed. A run that went back
    may take the same step on the same batch again; of those each process's nearest in time counts."""
    rows, ranks = [], []
    for rank, events in told.items():
        same = [other for other in events if all(other.get(name) == event.get(name) for name in _SAME)]
        own = min(same, key=lambda other: abs(other["time"] - event["time"]), default={}) if rank else event
        rows += [{**row, "rank": rank} for row in own.get("rows", [])]
        if (own.get("fault") or {}).get("here"):
            ranks.append(rank)
    return sorted(rows, key=lambda row: -row["loss"] if is_number(row.get("loss")) else -math.inf), sorted(ranks)


def _stands_out(row: dict[str, Any]) -> bool:
    return not is_number(row.get("loss")) or (is_number(row.get("median")) and row["loss"] > 2 * row["median"])


def _leaps(events: list[dict[str, Any]]) -> list[Trouble]:
    """Steps that would have been skipped with train.spikes on."""
    spikes, found = Spikes(SpikeConfig()), []
    for event in events:
        loss, norm, step = (event.get(name) for name in ("loss", "grad_norm", "step"))
        if event["event"] == "step" and is_number(loss) and is_number(norm) and is_number(step):
            reason = spikes.why(loss, norm)
            if reason:
                found.append(Trouble("leap", int(step), reason))
            spikes.add(loss, norm, step=int(step), batch=None, skipped=bool(reason))
    return found


def _hangs(logs: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each hang once, however many processes told of it."""
    told = [event for events in logs.values() for event in _fields(events, "hang")]
    return list({(event["attempt"], tuple(one.get("rank") for one in event.get("processes", []))): event
                 for event in told}.values())


def _fields(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]
