"""events.jsonl: everything that happened in a run, one JSON object a line, append-only.

Every event carries `event` (its kind), `time` (Unix seconds) and `attempt` (1 for the first start of the run, one
more for each resume). A resumed run repeats steps that the killed attempt had already logged; readers keep the
last event of each step. The kinds and their fields are listed in docs/design/events.md.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

REPEATED_PER_STEP = ("step", "evaluation", "sample")
BETWEEN_STEPS = ("evaluation", "sample", "checkpoint", "other")
IN_STEP = ("data", "wait", "forward", "backward", "norm", "optimizer", "rerun", "gc")
"""phases of a step: waiting for a batch; waiting for all processes to begin; the model's forward, and the rest of the
gradient, each with what it communicates; joining losses and norms; clipping and moving; repeating a suspicious step"""


class EventLog:
    """Appends events to one file; each line is written with a single call, so a kill tears at most the last."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.attempt = 1 + max((event["attempt"] for event in read_events(path)), default=0)
        self._file = open(path, "ab")  # noqa: SIM115 (open for the life of the run)
        if path.stat().st_size and not _ends_with_newline(path):
            self._file.write(b"\n")    # the previous attempt was killed in the middle of a line

    def write(self, event: str, **fields: Any) -> dict[str, Any]:
        """Appends one event and returns it. Non-finite numbers become null: JSON has none."""
        record = {"event": event, "time": round(time.time(), 3), "attempt": self.attempt, **finite(fields)}
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()
        return record

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole events in order; a torn line is skipped. Empty when the file is absent."""
    events = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "event" in record and "attempt" in record:
                events.append(record)
    return events


def last_per_step(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drops what a later attempt did again: of step-wise events only the last of each step (and split) stays."""
    last = {}
    for index, record in enumerate(events):
        if record["event"] in REPEATED_PER_STEP:
            last[(record["event"], record.get("step"), record.get("split"), record.get("prompt"))] = index
    kept = set(last.values())
    return [record for index, record in enumerate(events)
            if record["event"] not in REPEATED_PER_STEP or index in kept]


def finite(value: Any) -> Any:
    """The value with None for every number in it that is not finite: JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
