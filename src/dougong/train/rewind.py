"""The way back when leaps persist: the last good checkpoint, and the batches that led there passed over.

    while True:
        for result in fit(state, objective, runtime, config, directory=run.path):
            hooks.run(result)
        if state.rewind is None:
            break
        reporter.write("rewind", **go_back(state, checkpointer, recipe_hash=recipe_hash))
"""

import shutil
from shlex import quote
from typing import Any

from dougong.core.errors import DougongError
from dougong.core.run import RunDirectory
from dougong.train.checkpoint import Checkpointer, load_checkpoint
from dougong.train.manifest import Found, first_valid
from dougong.train.peers import Peers
from dougong.train.state import TrainState


def go_back(state: TrainState, checkpointer: Checkpointer, *, recipe_hash: str = "") -> dict[str, Any]:
    """Puts `state` back to the newest whole checkpoint from before the leaps, bans their batches, and saves that at
    once, so that a crash does not forget it; the time that the left way took stays counted. Returns the fields of the
    `rewind` event.

    Later checkpoints are removed: they are of the way that was left. Every process calls it. Raises DougongError where
    there is no such checkpoint, or training has gone back too often.
    """
    request, config, run, now = state.rewind, state.spikes.config, checkpointer.run, state.step
    assert request is not None and config is not None
    checkpointer.wait()
    banned, rewinds = [*state.spikes.banned, [request.first, request.last]], state.spikes.rewinds + 1
    peers = Peers.of(checkpointer.mesh)
    found = newest_before(run, request.step, peers)
    if found.path is None or rewinds > config.max_rewinds:
        raise _lost(now, rewinds, found, run)
    spent = state.elapsed_s
    load_checkpoint(found.path, state, recipe_hash=recipe_hash, mesh=checkpointer.mesh, checked=True)
    state.elapsed_s = spent
    state.rewind, state.spikes.banned, state.spikes.rewinds = None, banned, rewinds
    peers.from_first(lambda: _remove_after(run, state.step))
    checkpointer.save(state, "rewind")
    checkpointer.wait(take=False)       # it is on the disk, and told of with the next
    return {"step": now, "to_step": state.step, "first_batch": request.first, "last_batch": request.last - 1,
            "first_leap": request.step, "leaps": request.leaps, "checkpoint": found.path.name, "count": rewinds}


def newest_before(run: RunDirectory, step: int, peers: Peers) -> Found:
    """The newest whole checkpoint in which step `step` had not been tried. Processes share the work: one alone could
    take longer than the others may wait."""
    steps = peers.from_first(lambda: [saved for saved in reversed(run.checkpoint_steps()) if saved < step])
    return first_valid({saved: run.checkpoint(saved) for saved in steps}, peers)


def _remove_after(run: RunDirectory, step: int) -> None:
    for later in run.checkpoint_steps():
        if later > step:
            shutil.rmtree(run.checkpoint(later), ignore_errors=True)


def _lost(now: int, rewinds: int, found: Found, run: RunDirectory) -> DougongError:
    why = f"training has gone back {rewinds - 1} times already (train.spikes.max_rewinds)" if found.path else \
        "no whole checkpoint from before the first leap is left"
    return DougongError(f"training stopped at step {now}: loss or gradient leap again and again, and {why}.\n"
                        "Try a lower learning rate (optim.lr) or a longer warm-up (schedule.warmup), and look at the "
                        f"batches that are named by: dougong report {quote(str(run.path))} --why")
