"""Under torchrun, what dies is started again by itself; what does not come back is done without."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ends import RunDirectory, processes, starts, steps_done
from teams import Launch, Team, free_port
from test_many_processes import STEPS, alone, assert_identical, largest_difference, pair, still  # noqa: F401

from dougong.core.events import read_events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.chaos("kill -9 of one of two workers under torchrun, twice",
                   must="starts again by itself, and ends as the uninterrupted run of two")
def test_a_worker_is_killed(lab, still, pair, told):   # noqa: F811
    run = RunDirectory(lab / "restarted")
    launch = Launch(lab, ["--standalone", "--nproc-per-node=2", "--max-restarts=3", "--monitor-interval=0.2"], "train",
                    still, "--run", run.path, "layout.shard=2", fault="slow_steps:0.1", log="restarted")
    try:
        for step in (9, 23):
            launch.wait_until(lambda step=step: steps_done(run) >= step)
            os.kill(launch.workers()[-1], signal.SIGKILL)
        assert launch.end() == 0, launch.said()[-3000:]
    finally:
        launch.kill()
    assert starts(run)[0] == 0 and len(starts(run)) == 3 and all(step >= 5 for step in starts(run)[1:])
    assert_identical(run, pair)
    told(f"went on from steps {starts(run)[1:]}; bit-identical")


ELASTIC = ["--nnodes=1:2", "--nproc-per-node=2", "--max-restarts=3", "--monitor-interval=0.2", "--rdzv-backend=c10d",
           "--rdzv-conf=last_call_timeout=12,keep_alive_interval=1,keep_alive_max_attempt=3"]


def shrunk(lab, recipe, run, leaves):
    """Two machines train; the second `leaves` after step 12, and the first has to end the run."""
    port = free_port()
    options = [*ELASTIC, f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id={run.path.name}"]
    command = ("train", recipe, "--run", run.path, "layout.shard=2")
    hosts = [Launch(lab, options, *command, fault="slow_steps:0.2", log=f"{run.path.name}-0")]
    try:
        hosts[0].wait_until(lambda: listens(port))
        hosts.append(Launch(lab, options, *command, fault="slow_steps:0.2", log=f"{run.path.name}-1"))
        hosts[0].wait_until(lambda: steps_done(run) >= 12)
        assert processes(run) == [4], "they did not begin together"
        leaves(hosts[1])
        assert hosts[0].end() == 0, hosts[0].said()[-3000:]
    finally:
        for host in hosts:
            host.kill()
    assert processes(run) == [4, 2]


@pytest.mark.chaos("kill -9 of one of two machines (agent and workers) under torchrun --nnodes=1:2",
                   must="goes on with 2 of 4 processes by itself; losses within 1e-6 of the uninterrupted run's")
def test_a_machine_is_lost(lab, still, alone, told):   # noqa: F811
    run = RunDirectory(lab / "shrunk")
    shrunk(lab, still, run, Launch.kill)
    difference = largest_difference(run, alone)
    assert difference < 1e-6
    told(f"4 processes beyond step 12, then 2 from step {starts(run)[-1]}; losses differ by at most {difference:.1e} "
         f"relative from those of one process")


@pytest.mark.chaos("SIGTERM to one of two machines (its agent) under torchrun --nnodes=1:2, as when a pod is evicted",
                   must="all save after the same step, and 2 of 4 processes go on from it by themselves; losses within "
                        "1e-6 of the uninterrupted run's")
def test_a_machine_is_told_to_leave(lab, still, alone, told):   # noqa: F811
    run = RunDirectory(lab / "evicted")
    shrunk(lab, still, run, lambda host: host.process.terminate())
    ends = [event for event in read_events(run.events) if event["event"] == "end"]
    assert [end["reason"] for end in ends] == ["interrupted", "done"] and ends[0]["step"] == starts(run)[-1] >= 12
    difference = largest_difference(run, alone)
    assert difference < 1e-6
    told(f"4 processes saved after step {ends[0]['step']}, 2 went on from it; losses differ by at most "
         f"{difference:.1e} relative from those of one process")


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


STAND_INS = {
    "scontrol": 'if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> "$CALLS"; fi',
    "srun": 'while [[ $1 == --* ]]; do shift; done; echo $$ > "$CALLS.step"; exec "$@"',
    "scancel": 'kill -TERM "$(cat "$CALLS.step")"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


@pytest.mark.chaos("the Slurm file of examples/cluster gets USR1, as before its time is over (stand-ins for Slurm's "
                   "commands)",
                   must="saves, queues itself again, goes on, and ends as the uninterrupted run of two")
def test_slurm_queues_again(lab, still, told):   # noqa: F811
    steps, port = 400, 29400
    run, recipe = RunDirectory(lab / "queued"), lab / "long.yaml"
    recipe.write_text(still.read_text().replace(f"steps: {STEPS}", f"steps: {steps}"))
    whole = Team(lab, 2, "train", recipe, "--run", lab / "long", "layout.shard=2").end()
    assert [one.code for one in whole] == [0, 0], whole
    commands = lab / "slurm"
    commands.mkdir()
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}", "CALLS": str(lab / "asked-of-slurm"), "OMP_NUM_THREADS": "1",
        "DOUGONG_CACHE": str(lab / "cache"), "PYTHONPATH": os.pathsep.join(sys.path), "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_SUBMIT_DIR": str(lab),
        "RECIPE": str(recipe), "RUN": str(run.path), "SHARD": "2"}
    assert not listens(port), f"port {port} is in use here"

    def submit():
        script = Path(__file__).parents[2] / "examples/cluster/slurm.sbatch"
        with open(lab / "slurm.log", "ab") as log:
            return subprocess.Popen([script], env=environment, stdout=log, stderr=log, start_new_session=True)

    jobs = [submit()]
    try:
        deadline = time.monotonic() + 120
        while steps_done(run) < 20:
            assert jobs[0].poll() is None and time.monotonic() < deadline, (lab / "slurm.log").read_text()[-3000:]
            time.sleep(0.02)
        jobs[0].send_signal(signal.SIGUSR1)
        assert jobs[0].wait(120) == 0, (lab / "slurm.log").read_text()[-3000:]
        assert "requeue 4711" in (lab / "asked-of-slurm").read_text()
        jobs.append(submit())
        assert jobs[1].wait(120) == 0, (lab / "slurm.log").read_text()[-3000:]
    finally:
        for job in jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
    begun = starts(run)
    assert len(begun) == 2 and 20 <= begun[1] < steps
    assert_identical(run, RunDirectory(lab / "long"))
    told(f"saved and queued again at step {begun[1]} of {steps}; bit-identical")
