"""Joining the processes that `torchrun` started, and leaving them. One process joins nothing."""

import datetime
import os
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist

from dougong.core.errors import DougongError

START_TIMEOUT_S = 7200
"""the first collectives wait for data to be prepared, kernels to be compiled and slow hosts to start"""
STEP_TIMEOUT_S = 600
"""once steps run, who waits longer than this for another has lost it"""


def launched() -> int:
    """Processes that were launched together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def launched_here() -> int:
    """Those of them on this machine, which share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def join(device_type: str) -> None:
    """Makes the default group of the launched processes, if there are several and it does not exist yet."""
    if launched() == 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = datetime.timedelta(seconds=START_TIMEOUT_S)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    dist.init_process_group(backend, store=_of_this_start(store, rank, size), rank=rank, world_size=size,
                            timeout=timeout)


def _of_this_start(store: Any, rank: int, size: int) -> dist.PrefixStore:
    """The store under a name that only the processes of this start know.

    torchrun keeps its store when it starts processes again, and in it the addresses of the dead: whoever reads a
    neighbour's address before the neighbour has written the new one waits for a dead process for ever. So each process
    asks under a number never used before, and process 0 answers with a name as new, until all have it.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", own)
        name = store.get(f"name-for/{own}").decode()    # waits
        store.add(f"{name}/have-it", 1)
        return dist.PrefixStore(name, store)
    answered: dict[int, str] = {}
    end = time.monotonic() + START_TIMEOUT_S
    while store.add(f"{own}/have-it", 0) < size - 1:
        for other in range(1, size):
            if store.check([f"asks/{other}"]) and (asked := store.get(f"asks/{other}").decode()) != answered.get(other):
                store.set(f"name-for/{asked}", own)
                answered[other] = asked
        if time.monotonic() > end:
            raise RuntimeError(f"after {START_TIMEOUT_S} s not all of {size} processes have started")
        time.sleep(0.01)
    return dist.PrefixStore(own, store)


def wait_up_to(seconds: int, groups: Iterable[Any]) -> None:
    """From now on collectives of these groups (None: the default one) fail after so long."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    for group in groups if dist.is_initialized() else ():
        _set_pg_timeout(datetime.timedelta(seconds=seconds), group)


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


def first_alone(name: str, work: Callable[[], Any]) -> Any:
    """Process 0's `work`, of any length, which the others wait for; None on them. `name`: used once by a launch.

    They wait in no collective, whose time is a step's, and may not leave: five minutes after a machine's processes have
    ended torchrun takes down the rendezvous, and with it all. Raises DougongError on them where the work failed.
    """
    if launched() == 1:
        return work()
    default: Any = dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore(name, default.clone())     # a connection of its own: waiting keeps it from all other use
    if process_rank() > 0:
        store.wait(["over"], datetime.timedelta(days=365))
        over = store.get("over")
        store.add("heard", 1)
        if over != b"done":
            raise DougongError("process 0 failed; what it says tells why.")
        return None
    over = "failed"
    try:
        result, over = work(), "done"
        return result
    finally:
        store.set("over", over)
        end = time.monotonic() + 60     # the store may be this process's own, and goes with it
        while store.add("heard", 0) < launched() - 1 and time.monotonic() < end:
            time.sleep(0.01)


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if launched() > 1:
        dist.barrier()
