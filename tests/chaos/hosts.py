"""Two network namespaces standing for two machines: each with its own address, and a cable that can be pulled."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

_NET = "10.97.0"


@dataclass(frozen=True)
class Host:
    """A machine: the name of its namespace, of its network card, and its address."""

    name: str
    card: str
    address: str

    @property
    def prefix(self) -> list[str]:
        """What to put before a command to run it there."""
        return ["ip", "netns", "exec", self.name]

    def pull_the_cable(self) -> None:
        _ip("-n", self.name, "link", "set", self.card, "down")

    def plug_it_in(self) -> None:
        _ip("-n", self.name, "link", "set", self.card, "up")


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Skips the test, with the reason, where namespaces are not permitted."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need iproute2's `ip`")
    first, second = (Host(f"dougong-{os.getpid()}-{n}", f"cable{n}", f"{_NET}.{n}") for n in (1, 2))
    try:
        for host in (first, second):
            made = subprocess.run(["ip", "netns", "add", host.name], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"network namespaces need root here: {made.stderr.strip()}")
        _ip("link", "add", first.card, "netns", first.name, "type", "veth", "peer", "name", second.card, "netns",
            second.name)
        for host in (first, second):
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.card)
            _ip("-n", host.name, "link", "set", "lo", "up")
            host.plug_it_in()
        yield first, second
    finally:
        for host in (first, second):
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
