"""Several processes for one test, in a fifth of a second: forked from this one, joined by gloo through a file."""

import datetime
import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # meshes import it at their first use: once here, not again in every forked process
import torch.distributed as dist

TIMEOUT_S = 120


def run_processes(number: int, work: Callable[..., Any], *arguments: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """`work(*arguments)` in `number` processes of one gloo group; what each returned, by rank.

    Fails with the first process's traceback, or, when one hangs, with the names of those that did. `work` must not
    have run any parallel torch operation in this process with more than one thread: threads do not survive a fork.
    """
    assert torch.get_num_threads() == 1, "forked processes need one thread each (tests/conftest.py)"
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        children = [context.Process(target=_child, args=(rank, number, folder, work, arguments))
                    for rank in range(number)]
        for child in children:
            child.start()
        try:
            return _collect(children, Path(folder), timeout_s)
        finally:
            for child in children:
                if child.is_alive():
                    child.kill()
                child.join()


def _collect(children: list[Any], folder: Path, timeout_s: float) -> list[Any]:
    end = time.monotonic() + timeout_s
    while any(child.is_alive() for child in children):
        failed = sorted(folder.glob("*.error"))
        if failed:
            time.sleep(0.2)     # let the others write what they saw
            break
        if time.monotonic() > end:
            hanging = [rank for rank, child in enumerate(children) if child.is_alive()]
            raise AssertionError(f"after {timeout_s} s ranks {hanging} of {len(children)} have not ended")
        time.sleep(0.01)
    failed = sorted(folder.glob("*.error"))
    if failed:
        raise AssertionError("\n".join(f"rank {path.stem}:\n{path.read_text()}" for path in failed[:2]))
    codes = [child.exitcode for child in children]
    assert not any(codes), f"processes ended with {codes}"
    return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(len(children))]


def _child(rank: int, number: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(number), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(number))
    code = 1
    gc.freeze()     # what the parent made is not looked through, nor copied for it
    try:
        store = dist.FileStore(f"{folder}/store", number)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=number,
                                timeout=datetime.timedelta(seconds=TIMEOUT_S))
        torch.save(work(*arguments), f"{folder}/{rank}.result")
        dist.barrier()
        code = 0
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)      # no clean-up of the parent's: this process was forked from the middle of a test
