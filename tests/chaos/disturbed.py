"""What torchrun starts in place of dougong itself: dougong with a fault in it.

CHAOS_FAULT=slow_steps:0.1 (every step takes so many seconds longer, so that there is time to be killed), or
CHAOS_FAULT=watch_closely:0.1 (slow steps, and a watch that waits for seconds where it usually waits for a minute).
"""

import os

import faults

from dougong.cli.main import main


def slow_steps(seconds: float) -> None:
    faults.slow(seconds, range(1, 10_000))


def watch_closely(seconds: float) -> None:
    slow_steps(seconds)
    faults.impatient_watch(5.0)


if __name__ == "__main__":
    name, _, seconds = os.environ["CHAOS_FAULT"].partition(":")
    {"slow_steps": slow_steps, "watch_closely": watch_closely}[name](float(seconds))
    main()
