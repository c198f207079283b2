"""Several processes of one run: forked and joined (`Team`), or started and watched over by torchrun (`Launch`)."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lives import LIMIT_S, Ended, Life

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Team:
    """`number` lives that join as torchrun's would; `faults` by rank."""

    def __init__(self, lab: Path, number: int, *arguments: object,
                 faults: dict[int, Callable[[], None]] | None = None) -> None:
        common = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        self.lives = [Life(lab, *arguments, fault=(faults or {}).get(rank),
                           environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                      for rank in range(number)]

    def end(self, limit_s: float = LIMIT_S) -> list[Ended]:
        """By rank. A process that outlives the limit fails the test; none is left behind."""
        try:
            return [life.end(limit_s) for life in self.lives]
        finally:
            self.kill()

    def kill(self) -> None:
        for life in self.lives:
            if life.alive:
                life.send(signal.SIGKILL)


class Launch:
    """torchrun with real processes. `fault`: see disturbed.py; `prefix`: what to start it with."""

    def __init__(self, lab: Path, options: Sequence[object], *arguments: object, fault: str, log: str,
                 prefix: Sequence[str] = (), environment: dict[str, str] | None = None) -> None:
        settings = os.environ | {"DOUGONG_CACHE": str(lab / "cache"), "OMP_NUM_THREADS": "1", "CHAOS_FAULT": fault,
                                 "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])} | (environment or {})
        command = [*prefix, sys.executable, "-m", "torch.distributed.run", *options, HERE / "disturbed.py", "--",
                   *arguments]
        self.log = lab / f"{log}.log"
        with open(self.log, "ab") as file:
            self.process = subprocess.Popen(list(map(str, command)), env=settings, stdout=file,
                                            stderr=subprocess.STDOUT, start_new_session=True)

    def workers(self) -> list[int]:
        """Process ids of the agent's children that train, oldest first."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    if parent == self.process.pid and b"disturbed.py" in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
                except OSError:     # it ended while we looked
                    continue
        return sorted(found)

    def wait_until(self, condition: Callable[[], bool], *, limit_s: float = LIMIT_S) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert self.process.poll() is None, f"torchrun ended too early:\n{self.said()[-3000:]}"
            assert time.monotonic() < deadline, f"nothing came of waiting for {limit_s} s:\n{self.said()[-3000:]}"
            time.sleep(0.05)

    def kill(self) -> None:
        """`kill -9` of the agent and all its processes: the machine is gone."""
        if self.process.poll() is None:
            workers = self.workers()
            for number in [self.process.pid, *workers]:     # the agent first, so that it starts nothing again
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
        self.process.wait()

    def end(self, limit_s: float = LIMIT_S) -> int:
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"torchrun still runs after {limit_s} s:\n{self.said()[-3000:]}") from None
        finally:
            self.kill()

    def said(self) -> str:
        return self.log.read_text(errors="replace")
