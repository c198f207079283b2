"""The suite's table: what was done to a run, how it must end, how it ended."""

import json
import os
import platform
import textwrap
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def printed(rows: list[Row]) -> str:
    """The table for a terminal."""
    lines = []
    for row in rows:
        lines.append(f"{row['outcome'].upper():7} {row['seconds']:6.1f} s  {row['done']}")
        for mark, text in (("must end: ", row["must"]), ("ended:    ", row["ended"])):
            if text:
                lines += textwrap.wrap(text, 120, initial_indent=" " * 19 + mark, subsequent_indent=" " * 29)
    return "\n".join(lines)


def write(rows: list[Row], path: Path, *, command: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cores": len(os.sched_getaffinity(0)), "processor": platform.machine(), "system": platform.system(),
               "python": platform.python_version(), "torch": torch.__version__}
    path.write_text(json.dumps({"command": command, "machine": machine, "rows": rows}, ensure_ascii=False, indent=1)
                    + "\n")
