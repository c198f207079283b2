"""A life: one `dougong` command in a process of its own, begun in a fifth of a second.

Starting Python and loading torch takes seconds, so a server that has everything loaded (multiprocessing's own
"forkserver") forks a process for each life. From then on it is the real command line, ended by real signals.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_LOADED = ["dougong.recipes.train", "dougong.report.page", "dougong.evaluate.comparison", "dougong.generate",
           "dougong.data.prepare", "dougong.models.families.nano", "torch._dynamo", "torch.distributed.fsdp",
           "tokenizers", "rich.progress", "numpy.random", "typer", "jinja2"]
LIMIT_S = 120


@dataclass(frozen=True)
class Ended:
    """How a life ended: exit code (negative: the signal that killed it), what it said, and how long it took."""

    code: int
    out: str
    err: str
    seconds: float


class Life:
    """`dougong ARGUMENTS` with a `fault` (called in the new process first; see faults.py)."""

    _count = 0

    def __init__(self, lab: Path, *arguments: object, fault: Callable[[], None] | None = None,
                 environment: dict[str, str] | None = None) -> None:
        Life._count += 1
        self._log = lab / "said" / f"{Life._count:04d}"
        self._log.parent.mkdir(exist_ok=True)
        settings = {"DOUGONG_CACHE": str(lab / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "500"} | (environment or {})
        self.process = _server().Process(target=_live, args=(list(map(str, arguments)), self._log, settings, fault))
        self._began, self._ended = time.monotonic(), None
        self.process.start()

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill_after(self, seconds: float) -> bool:
        """Lets it live for so long, then `kill -9`; whether it was still alive."""
        self.process.join(seconds)
        if self.alive:
            self.send(signal.SIGKILL)
        return self.end().code == -signal.SIGKILL

    def wait_until(self, condition: Callable[[], bool], *, limit_s: float = 60) -> None:
        """Returns when the condition holds. Fails if the life ends before that."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert self.alive, f"it ended too early: {self.end()}"
            assert time.monotonic() < deadline, f"nothing came of waiting for {limit_s} s"
            time.sleep(0.005)

    def end(self, limit_s: float = LIMIT_S) -> Ended:
        """Waits for its end. Fails, after killing it, if that takes longer than the limit."""
        self.process.join(limit_s)
        self._ended = self._ended or time.monotonic()
        if self.alive:
            self.send(signal.SIGKILL)
            raise AssertionError(f"still running after {limit_s} s; it said:\n{self._text('err')[-2000:]}")
        return Ended(self.process.exitcode, self._text("out"), self._text("err"), self._ended - self._began)

    def _text(self, stream: str) -> str:
        path = self._log.with_suffix(f".{stream}")
        return path.read_text(errors="replace") if path.exists() else ""


def _server() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    return context


def _live(arguments: list[str], log: Path, settings: dict[str, str], fault: Callable[[], None] | None) -> None:
    for stream, number in (("out", 1), ("err", 2)):
        file = os.open(log.with_suffix(f".{stream}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(settings)
    sys.argv = ["dougong", *arguments]
    if fault is not None:
        fault()
    from dougong.cli.main import main

    main()
