"""Joining the processes that `torchrun` started, and leaving them. One process joins nothing."""

import datetime
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

START_TIMEOUT_S = 7200
"""the first collectives wait for data to be prepared, kernels to be compiled and slow hosts to start"""
STEP_TIMEOUT_S = 600
"""once steps run, who waits longer than this for another has lost it"""


def launched() -> int:
    """Processes that were launched together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def join(device_type: str) -> None:
    """Makes the default group of the launched processes, if there are several and it does not exist yet."""
    if launched() == 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=START_TIMEOUT_S))


def expect_steps(groups: Iterable[Any]) -> None:
    """From now on collectives of the default group and of these fail after a step's time, not a start's."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    if dist.is_initialized():
        for group in {None, *groups}:
            _set_pg_timeout(datetime.timedelta(seconds=STEP_TIMEOUT_S), group)


def leave() -> None:
    """Ends the default group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def from_first(value: Any) -> Any:
    """Process 0's `value` (JSON-like or picklable by us alone: it never comes from a file) on every process."""
    if launched() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if launched() > 1:
        dist.barrier()
