"""Who hangs, and where: a thread in every process that says where the process stands, and ends all when one is stuck.

In lockstep training one stuck process makes all others wait in a collective, which says nothing about who is missing.
Here each process writes once a second what it is doing to a board (the store by which the processes found each other).
One that has not moved for its limit looks at the others: whoever is furthest behind, and over its own limit or silent,
is named with its stack, and every process leaves, so that torchrun starts them again.

Limits have two phases: whatever has never been finished (the first step, the first evaluation) may take as long as a
start may; later 10 times the median step, or the longest such phase, and never less than a minute. A save, and what
follows the last step, may have to wait for a disk, and the rows of a suspicious step are looked at one by one: as long
as a start, always.
"""

import faulthandler
import json
import os
import re
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from dougong.core.events import BETWEEN_STEPS
from dougong.runtime.processes import START_TIMEOUT_S
from dougong.train.phases import Clock

EXIT_HUNG = 70
"""exit code of processes that leave because one of them hangs"""
_TIMES = 10
_FRAMES = 6
_UNMEASURED = ("checkpoint", "rerun")
"""phases of which the earlier ones say nothing: most saves only copy, and now and then one waits for the disk; most of
`rerun` takes a moment, and then come as many forwards as there are rows"""
_WAITS_IN = tuple(f"{os.sep}torch{os.sep}{name}{os.sep}" for name in ("distributed", "autograd", "cuda"))
"""where a process's stack ends while it waits for others, or for its device, which waits for theirs"""
_READS_DEVICE = re.compile(r"\.(tolist|item|cpu)\(")


class Board(Protocol):
    """Short texts that all processes can read."""

    def write(self, name: str, text: str) -> None: ...

    def read(self, name: str) -> str | None: ...


class StoreBoard:
    """On the store of the process group, by a connection of its own."""

    def __init__(self) -> None:
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("dougong-watch", store.clone())

    def write(self, name: str, text: str) -> None:
        self._store.set(name, text)

    def read(self, name: str) -> str | None:
        return self._store.get(name).decode() if self._store.check([name]) else None


class Watch:
    """Runs beside the training of one process:  with Watch(clock, StoreBoard(), rank=, size=, directory=run.path).

    `on_hang` gets the fields of a `hang` event just before the process leaves with `EXIT_HUNG`.
    """

    def __init__(self, clock: Clock, board: Board, *, rank: int, size: int, directory: Path, floor_s: float = 60.0,
                 start_s: float = START_TIMEOUT_S, interval_s: float = 1.0,
                 on_hang: Callable[[dict[str, Any]], object] = lambda _fields: None) -> None:
        self.clock, self.board, self.rank, self.size, self.directory = clock, board, rank, size, directory
        self.floor_s, self.start_s, self.interval_s, self.on_hang = floor_s, start_s, interval_s, on_hang
        self._main = threading.get_ident()
        self._stop, self._beat = threading.Event(), 0
        self._seen: dict[int, tuple[int, float]] = {}
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._write("done")
        self._stop.set()
        self._thread.join()

    def limit_s(self) -> float:
        """How long the present phase may take."""
        phase, steps = self.clock.phase, list(self.clock.step_seconds)
        if phase in _UNMEASURED:
            return self.start_s
        if phase in BETWEEN_STEPS and phase != "other":
            longest = self.clock.longest.get(phase)
            return self.start_s if longest is None else max(self.floor_s, _TIMES * longest)
        return max(self.floor_s, _TIMES * statistics.median(steps)) if steps else self.start_s

    def _run(self) -> None:
        while not self._stop.wait(self.interval_s):
            try:
                self._look()
            except (OSError, RuntimeError, ValueError):     # the store's host is gone: torchrun ends us all
                continue

    def _look(self) -> None:
        still = self._write(self.clock.phase)
        if self.board.read("ask"):
            self._publish_stack()
        if still < self.limit_s():
            self._seen.clear()
            return
        entries = {rank: entry for rank in range(self.size) if (entry := self._read(rank))}
        behind = self._stuck(entries)
        if behind:
            self._leave(entries, behind, still)

    def _write(self, phase: str) -> float:
        """Puts this process's place on the board; returns the seconds since it moved."""
        self._beat += 1
        still = time.monotonic() - self.clock.since
        self.board.write(f"rank-{self.rank}", json.dumps({
            "step": self.clock.step, "moves": self.clock.moves, "phase": phase, "still_s": still,
            "limit_s": self.limit_s(), "beat": self._beat}))
        return still

    def _read(self, rank: int) -> dict[str, Any] | None:
        """A process's place, with the seconds for which nothing new has come from it (`silent_s`)."""
        text = self.board.read(f"rank-{rank}")
        if text is None:
            return None
        entry, now = json.loads(text), time.monotonic()
        beat, since = self._seen.get(rank, (None, now))
        self._seen[rank] = (entry["beat"], since if beat == entry["beat"] else now)
        return {**entry, "silent_s": now - self._seen[rank][1]}

    def _stuck(self, entries: dict[int, dict[str, Any]]) -> list[int]:
        """Those furthest behind that are over their own limit or silent; none while whoever is behind may still be at
        work."""
        places = {rank: (entry["step"], entry["moves"]) for rank, entry in entries.items() if entry["phase"] != "done"}
        behind = [rank for rank, place in places.items() if place == min(places.values())]
        stuck = [rank for rank in behind if entries[rank]["still_s"] >= entries[rank]["limit_s"]
                 or entries[rank]["silent_s"] >= self.floor_s]
        in_step = any(entries[rank]["moves"] for rank in behind)     # where who came first may wait for who came last
        return [] if in_step and len(stuck) < len(behind) else stuck

    def _leave(self, entries: dict[int, dict[str, Any]], behind: list[int], still: float) -> None:
        self.board.write("ask", "1")
        self.board.write(f"leaving-{self.rank}", "1")
        self._publish_stack()
        end = time.monotonic() + 5 * self.interval_s
        stacks: dict[int, str | None] = dict.fromkeys(behind)
        while time.monotonic() < end and None in stacks.values():
            time.sleep(self.interval_s / 10)
            stacks = {rank: self.board.read(f"stack-{rank}") for rank in behind}
        guilty = [rank for rank in behind if not _waits(stacks[rank])] or behind
        fields = {"processes": [{"rank": rank, **{name: entries[rank][name] for name in ("step", "phase", "still_s")},
                                 "silent": entries[rank]["silent_s"] >= self.floor_s, "stack": stacks[rank]}
                                for rank in guilty[:8]], "waited_s": still}
        message = _message(fields, self.size, self.directory)
        if self.rank not in guilty:
            self._print_for_all(message, set(entries) - set(guilty))
        self.on_hang(fields)
        time.sleep(2 * self.interval_s)     # let the others read the board that process 0 may hold
        if self.rank in guilty:
            self._print_for_all(message, guilty)    # if by now none of those that wait has
        os._exit(EXIT_HUNG)

    def _print_for_all(self, message: str, ranks: Iterable[int]) -> None:
        """Once: by the first of `ranks` that is leaving, since one that is frozen cannot print."""
        if any(self.board.read(f"leaving-{rank}") for rank in ranks if rank < self.rank) or self.board.read("told"):
            return
        self.board.write("told", "1")
        print(message, file=sys.stderr, flush=True)

    def _publish_stack(self) -> None:
        """Where this process stands: in short on the board, all threads whole in a file."""
        if self.board.read(f"stack-{self.rank}"):
            return
        stack = self._stacks()
        path = self.directory / f"stacks-rank-{self.rank:05d}.txt"
        with open(path, "w", encoding="utf-8") as file:
            place = f"step {self.clock.step + 1}, phase {self.clock.phase}"
            file.write(f"process {self.rank} of {self.size}, {place}\n\n{stack}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        self.board.write(f"stack-{self.rank}", stack or "?")

    def _stacks(self) -> str:
        """The ends of the stacks of all threads that Python knows, the main thread's last."""
        frames, names = sys._current_frames(), {thread.ident: thread.name for thread in threading.enumerate()}
        others = [f"in thread {names[ident]}:\n" + "".join(traceback.format_stack(frame)[-_FRAMES // 2:])
                  for ident, frame in frames.items() if ident != self._main and names.get(ident, "watch") != "watch"]
        main = frames.get(self._main)
        return "".join([*others, "in the main thread:\n", *(traceback.format_stack(main)[-_FRAMES:] if main else [])])


def _waits(stack: str | None) -> bool:
    """Whether a stack ends in waiting for other processes, or for numbers from the device."""
    frames = re.split(r"^\s*(?=File )", stack or "", flags=re.MULTILINE)[1:]
    while len(frames) > 1 and f"{os.sep}torch{os.sep}_ops.py" in frames[-1]:    # through which an operation is called
        frames.pop()
    if not frames:
        return False
    file, _, source = frames[-1].partition("\n")
    return any(place in file for place in _WAITS_IN) or _READS_DEVICE.search(source) is not None


def _message(fields: dict[str, Any], size: int, directory: Path) -> str:
    lines = []
    for one in fields["processes"]:
        what = "gives no sign of life" if one["silent"] else f"has not moved for {one['still_s']:.0f} s"
        lines.append(f"process {one['rank']} of {size} hangs: step {one['step'] + 1}, phase {one['phase']}; it {what}.")
        lines.append((one["stack"] or "  (it could not write its stack)").rstrip())
    return "\n".join([*lines, f"The others have been waiting for {fields['waited_s']:.0f} s; all processes end now. "
                      f"Stacks of all threads: {directory}/stacks-rank-*.txt"])
