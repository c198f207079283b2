"""Reads a run directory into `RunFacts`: everything the page shows, whatever state the run is in.

Every part may be missing: a run may have just begun, been killed, be a GAN without bits per byte, or hold a
torn line. Nothing here raises for that; only a directory that is no run is refused.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dougong.core.errors import CheckpointError
from dougong.core.events import BETWEEN_STEPS, last_per_step, read_events
from dougong.core.run import RunDirectory
from dougong.report.numbers import is_number

_FRESH_S = 300.0
"""A run without an `end` and without a lock file counts as running for this long after its last event."""
_STEPWISE = ("step", "evaluation", "sample", "skip", "checkpoint")
_NOT_MEASURED = {"event", "time", "attempt", "step", "tokens", "elapsed_s", "weight", "epoch", "memory_bytes"}


@dataclass(frozen=True)
class Series:
    """The step events as columns of equal length; NaN where a step lacks a value."""

    step: np.ndarray
    tokens: np.ndarray
    minutes: np.ndarray
    values: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.step)

    def last(self, key: str) -> float | None:
        column = self.values.get(key)
        finite = column[np.isfinite(column)] if column is not None else np.array([])
        return float(finite[-1]) if len(finite) else None

    def median(self, key: str) -> float | None:
        column = self.values.get(key)
        finite = column[np.isfinite(column)] if column is not None else ()
        return float(np.median(finite)) if len(finite) else None


@dataclass(frozen=True)
class Attempt:
    """One start of the run, up to its end or the last sign of life."""

    number: int
    start: dict[str, Any]
    end: dict[str, Any] | None
    first_time: float | None
    first_step: int
    last_step: int
    """where it is, or ended: after going back, less than it had come to"""


@dataclass(frozen=True)
class RunFacts:
    """A run, read. Mappings and lists hold the events of docs/design/events.md as they were written."""

    name: str
    status: str
    recipe: dict[str, Any]
    recipe_text: str
    resolved: dict[str, Any]
    attempts: list[Attempt]
    series: Series
    derived: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    skips: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    waits: dict[str, float] = field(default_factory=dict)
    """seconds for which training stood still between steps, by phase"""
    training_s: float | None = None
    """seconds of training over all attempts, evaluation excluded; as of `waits` and `evaluation_s`, with those of steps
    that were undone: they were spent too"""
    evaluation_s: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)
    before_after: dict[str, Any] = field(default_factory=dict)

    @property
    def start(self) -> dict[str, Any]:
        """The first start: its command made the run."""
        return self.attempts[0].start if self.attempts else {}

    @property
    def end(self) -> dict[str, Any]:
        """The newest `end`, empty while there is none."""
        return next((a.end for a in reversed(self.attempts) if a.end), {})

    @property
    def is_text(self) -> bool:
        """Whether a unit of training is a token, not an image or a row."""
        if self.recipe:
            return bool(self.recipe.get("tokenizer"))
        return any(is_number(e.get("bits_per_byte")) for e in [*self.evaluations, self.result])

    @property
    def last_step(self) -> int:
        """Where the newest attempt is."""
        return self.attempts[-1].last_step if self.attempts else 0

    @property
    def peak_memory_bytes(self) -> float | None:
        seen = [a.end.get("peak_memory_bytes") for a in self.attempts if a.end] + [
            self.series.last("memory_bytes")
        ]
        return max((float(m) for m in seen if is_number(m)), default=None)


def read_facts(run: RunDirectory, *, now: float | None = None) -> RunFacts:
    """Reads `run`. Raises CheckpointError when it is not a run (neither a recipe nor an event)."""
    events = read_events(run.events)
    if not events and not run.recipe.is_file():
        raise CheckpointError(
            f"{run.path} is not a run: it has neither recipe.yaml nor events.jsonl.\n"
            "Give a directory that `dougong train` made."
        )
    text, recipe = _read_recipe(run.recipe)
    resolved = recipe.pop("resolved", None)
    attempts = _attempts(events)
    told, of = _by_kind(events), _by_kind(_still_true(events, attempts))
    return RunFacts(
        name=run.path.resolve().name or str(recipe.get("name", "run")),
        status=_status(run, events, attempts, time.time() if now is None else now),
        recipe=recipe,
        recipe_text=text,
        resolved=resolved if isinstance(resolved, dict) else {},
        attempts=attempts,
        series=_series(of.get("step", [])),
        derived=[v for e in of.get("derived", [])[-1:] for v in _dicts(e.get("values"))],
        data=_dict(of.get("data", [{}])[-1].get("facts")),
        model=of.get("model", [{}])[-1],
        evaluations=sorted(
            (e for e in of.get("evaluation", []) if is_number(e.get("step"))), key=lambda e: e["step"]
        ),
        samples=sorted(
            (e for e in of.get("sample", []) if is_number(e.get("step"))), key=lambda e: e["step"]
        ),
        skips=list({e.get("step"): e for e in of.get("skip", [])}.values()),
        warnings=of.get("warning", []),
        checkpoints=of.get("checkpoint", []),
        waits=_waits(told.get("step", [])),
        training_s=max((float(e["elapsed_s"]) for e in events if is_number(e.get("elapsed_s"))), default=None),
        evaluation_s=sum(e["seconds"] for e in told.get("evaluation", []) if is_number(e.get("seconds"))),
        result=of.get("result", [{}])[-1],
        before_after=of.get("before_after", [{}])[-1],
    )


def _read_recipe(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", {}
    try:
        return text, _dict(yaml.safe_load(text))
    except yaml.YAMLError:
        return text, {}


def _attempts(events: list[dict[str, Any]]) -> list[Attempt]:
    attempts = []
    for number in sorted({int(e["attempt"]) for e in events if is_number(e["attempt"])}):
        mine = [e for e in events if e["attempt"] == number]
        start = next((e for e in mine if e["event"] == "start"), {})
        ends = [e for e in mine if e["event"] == "end"]
        times = [e["time"] for e in mine if is_number(e.get("time"))]
        places = (e.get("to_step" if e["event"] == "rewind" else "step") for e in mine
                  if e["event"] in ("step", "end", "rewind"))
        steps = [step for step in places if is_number(step)]
        first = start.get("step") if is_number(start.get("step")) else (min(steps) if steps else 0)
        attempts.append(
            Attempt(
                number,
                start,
                ends[-1] if ends else None,
                min(times, default=None),
                int(first or 0),
                int(steps[-1] if steps else first or 0),
            )
        )
    return attempts


def _still_true(events: list[dict[str, Any]], attempts: list[Attempt]) -> list[dict[str, Any]]:
    """Without what was undone: going back to step 500, by a resume or a rewind, takes later steps told before it out,
    with their checkpoints."""
    began = {attempt.number: attempt.first_step for attempt in attempts}
    kept, limit = [], float("inf")
    attempt: Any = None
    for event in reversed(events):
        if event["attempt"] != attempt:
            attempt, limit = event["attempt"], min(limit, began.get(attempt, limit))
        if event["event"] == "rewind" and is_number(event.get("to_step")):
            limit = min(limit, event["to_step"])
        if event["event"] not in _STEPWISE or not is_number(event.get("step")) or event["step"] <= limit:
            kept.append(event)
    return last_per_step(kept[::-1])


def _by_kind(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        kinds.setdefault(str(event["event"]), []).append(event)
    return kinds


def _series(events: list[dict[str, Any]]) -> Series:
    events = sorted((e for e in events if is_number(e.get("step"))), key=lambda e: e["step"])
    keys = {k for e in events for k, v in e.items() if k not in _NOT_MEASURED and is_number(v)}

    def column(key: str) -> np.ndarray:
        return np.array([e[key] if is_number(e.get(key)) else np.nan for e in events], dtype=np.float64)

    tokens, weight, elapsed = column("tokens"), column("weight"), column("elapsed_s")
    if not np.isfinite(tokens).any() and np.isfinite(weight).all():
        tokens = np.cumsum(weight)
    return Series(
        step=column("step"),
        tokens=tokens,
        minutes=elapsed / 60,
        values={key: column(key) for key in sorted(keys | {"loss", "memory_bytes", "epoch"})},
    )


def _waits(events: list[dict[str, Any]]) -> dict[str, float]:
    phases = [_dict(e.get("phases")) for e in events]
    found = {name: sum(p[name] for p in phases if is_number(p.get(name))) for name in BETWEEN_STEPS}
    return {name: seconds for name, seconds in found.items() if seconds}


def _status(run: RunDirectory, events: list[dict[str, Any]], attempts: list[Attempt], now: float) -> str:
    """done, interrupted, failed or running: what the last attempt said, or whether it is still alive."""
    end = attempts[-1].end if attempts else None
    if end:
        reason = str(end.get("reason"))
        return {"done": "done", "early stop": "done", "failed": "failed"}.get(reason, "interrupted")
    held = _is_locked(run.lock)
    if held is None:
        last = max((e["time"] for e in events if is_number(e.get("time"))), default=float("-inf"))
        held = now - last < _FRESH_S
    return "running" if held else "interrupted"


def _is_locked(path: Path) -> bool | None:
    """Whether a process of this machine holds the run's lock; None where that cannot be told."""
    try:
        import fcntl
    except ImportError:  # not on this system
        return None
    try:
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
    except OSError:
        return None


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
