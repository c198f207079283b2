"""What every benchmark prints and writes: machine, versions, command; medians with their spread."""

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from dougong import __version__
from dougong.runtime.device import machine_facts


def header() -> dict[str, Any]:
    """Facts without which a speed says nothing; printed, and part of the JSON."""
    import platform

    facts = {"command": ["python", *sys.argv], "dougong": __version__, "torch": torch.__version__,
             "python": platform.python_version(), "threads": torch.get_num_threads(),
             "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT"),   # the command line sets 10000, as `make bench` does
             "machine": machine_facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"))}
    print(f"{facts['machine']['processor']}, {facts['machine']['cores']} cores, {facts['threads']} threads, "
          f"torch {facts['torch']}, dougong {__version__}\n{' '.join(facts['command'])}\n", flush=True)
    return facts


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def write(path: str | None, report: dict[str, Any]) -> None:
    """Writes the report as JSON where a path was given."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        print(f"\nwrote {path}")
