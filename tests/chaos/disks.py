"""Small and read-only file systems, where this machine permits to mount them."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(folder: Path, *, megabytes: int, options: str = "") -> Iterator[Path]:
    """`folder` as a file system of its own in memory. Skips the test, with the reason, where that is not permitted."""
    folder.mkdir(exist_ok=True)
    tried = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m{options}", "tmpfs", str(folder)],
                           capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"mounting a file system needs root here: {tried.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
