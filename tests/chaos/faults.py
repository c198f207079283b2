"""What goes wrong inside a life, and when. Each is called in the new process before the command begins:

    Life(lab, "train", …, fault=partial(at_step, 12, partial(stop_with, signal.SIGTERM)))
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def all_of(*faults: Callable[[], None]) -> None:
    for fault in faults:
        fault()


def stop_with(number: int) -> None:
    os.kill(os.getpid(), number)


def at_step(step: int, action: Callable[[], None]) -> None:
    """The action, while the loop's reader holds the result of this step: before anything is logged or saved of it."""
    import dougong.recipes.train as story

    fit = story.fit

    def disturbed(*arguments: Any, **named: Any) -> Any:
        for result in fit(*arguments, **named):
            if result.step == step:
                action()
            yield result

    story.fit = disturbed


def around(place: str, *, before: Callable[[], None] | None = None, after: Callable[[], None] | None = None,
           turn: int = 1) -> None:
    """The action before or after the `turn`-th call of a function, named as module:name or module:Class.name."""
    module_name, _, path = place.partition(":")
    __import__(module_name)
    owner, name = sys.modules[module_name], path.rpartition(".")[2]
    for part in path.split(".")[:-1]:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), [0]

    def disturbed(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if before and calls[0] == turn:
            before()
        result = original(*arguments, **named)
        if after and calls[0] == turn:
            after()
        return result

    setattr(owner, name, disturbed)


def kill_at_disk_operation(number: int, root: Path) -> None:
    """`kill -9` just before the number-th change to what lies under `root`: a file opened for writing, renamed or
    removed, a directory made."""
    seen = [0]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if _changes(event, arguments) and str(arguments[0]).startswith(str(root)):
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def count_disk_operations(root: Path, result: Path) -> None:
    """Writes to `result`, a byte for each, the operations that `kill_at_disk_operation` counts."""
    out = os.open(result, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if _changes(event, arguments) and str(arguments[0]).startswith(str(root)):
            os.write(out, b".")

    sys.addaudithook(watch)


def _changes(event: str, arguments: tuple[Any, ...]) -> bool:
    if event == "open":
        return bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in _CHANGES


def batches_with_nan(steps: range, *, field: str = "weight") -> None:
    """The loader gives out batches whose loss weights hold a NaN, at these steps (counted from 1)."""
    _change_batches(steps, field, float("nan"))


def _change_batches(steps: range, field: str, value: float) -> None:
    from dougong.data.loader import Loader

    take = Loader.__next__

    def disturbed(self: Any) -> Any:
        batch = take(self)
        if self.position in steps:
            batch[field][0, 0] = value
        return batch

    Loader.__next__ = disturbed


def clock_jumps(step: int, seconds: float) -> None:
    """From this step on the wall clock shows so much more (or less)."""
    true, jump = time.time, [0.0]
    time.time = lambda: true() + jump[0]
    at_step(step, lambda: jump.__setitem__(0, seconds))


def fill_disk(folder: Path, leaving: int) -> None:
    """Fills the file system of `folder` until so many bytes are free."""
    ballast = os.open(folder / "ballast", os.O_WRONLY | os.O_CREAT)
    os.lseek(ballast, 0, os.SEEK_END)
    block = os.statvfs(folder).f_frsize
    while (free := os.statvfs(folder).f_bavail * block) > leaving:
        try:
            os.write(ballast, b"\0" * min(1 << 16, free - leaving))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            break
    os.close(ballast)


def every_step(action: Callable[[int], None]) -> None:
    """The action with the number of each step, while the loop's reader holds its result."""
    import dougong.recipes.train as story

    fit = story.fit

    def disturbed(*arguments: Any, **named: Any) -> Any:
        for result in fit(*arguments, **named):
            action(result.step)
            yield result

    story.fit = disturbed


def slow(seconds: float, steps: range) -> None:
    """Steps that take so much longer."""
    every_step(lambda step: time.sleep(seconds) if step in steps else None)


def hang_at(step: int) -> None:
    """A process that does nothing any more."""
    at_step(step, lambda: time.sleep(3600))


def impatient_watch(floor_s: float) -> None:
    """A hang counts after so many seconds instead of a minute."""
    from dougong.train.watch import Watch

    begin = Watch.__init__

    def disturbed(self: Any, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **{**named, "floor_s": floor_s, "interval_s": 0.2})

    Watch.__init__ = disturbed


def record_rows(file: Path) -> None:
    """Adds a line for each row that this process takes: number of its batch, place in it, hash of its tokens."""
    import hashlib

    from dougong.data.loader import Loader

    take = Loader.batch

    def recorded(self: Any, number: int) -> Any:
        batch = take(self, number)
        hashes = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in batch["tokens"]]
        with open(file, "a") as out:
            out.writelines(f"{number} {place} {text}\n" for place, text in zip(self._mine, hashes, strict=True))
        return batch

    Loader.batch = recorded
