"""The launch files of examples/cluster: they parse, keep the rules of those who read them, and start what they say."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

from dougong.cli.main import app
from dougong.recipes.recipe import load_recipe

CLUSTER = Path(__file__).parents[3] / "examples" / "cluster"
SCRIPTS = ["torchrun.sh", "slurm.sbatch"]
CLAIM, JOB = (yaml.safe_load((CLUSTER / name).read_text()) for name in ("kubernetes-storage.yaml", "kubernetes.yaml"))


def check_torchrun(words):
    """What torchrun's and dougong's own parsers make of a command line. Fails on what either does not know."""
    assert words[0] == "torchrun"
    launch = get_args_parser().parse_args(words[1:])
    assert launch.module and launch.training_script == "dougong" and launch.training_script_args[0] == "train"
    command = typer.main.get_command(app).commands["train"]
    train = command.make_context("dougong", launch.training_script_args[1:]).params
    if not train["resume"]:
        load_recipe(train["recipe"], train["overrides"])
    return launch, train


SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def seconds_to_save(name):
    """Between torchrun's SIGTERM and SIGKILL to its processes, as a variable: before torch 2.12 it was no option."""
    return int(re.search(rf"^export {SHUTDOWN}=(\d+)", (CLUSTER / name).read_text(), re.M)[1])


# ---- shell

@pytest.mark.parametrize("name", SCRIPTS)
def test_shell_scripts_parse(name):
    assert subprocess.run(["bash", "-n", str(CLUSTER / name)], capture_output=True).returncode == 0
    assert os.access(CLUSTER / name, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_nothing_to_say(name):
    checked = subprocess.run(["shellcheck", "--shell=bash", str(CLUSTER / name)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A folder in front of PATH with commands that write down how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))

    def add(name, body=""):
        (folder / name).write_text('#!/usr/bin/env bash\n{ printf "%q " "${0##*/}" "$@"; echo; } >> "$CALLS"\n' + body)
        (folder / name).chmod(0o755)

    yield add


def calls(tmp_path):
    return [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]


def test_torchrun_script_starts_what_both_parsers_know(stand_ins, tmp_path):
    stand_ins("torchrun")
    environment = os.environ | {"FIRST_HOST": "10.0.0.1", "RUN": str(tmp_path / "runs/tiny"), "PROCESSES": "2",
                                "SHARD": "2", "LOCAL_ADDRESS": "10.0.0.2"}
    assert subprocess.run([str(CLUSTER / "torchrun.sh"), "train.steps=3"], env=environment).returncode == 0
    launch, train = check_torchrun(calls(tmp_path)[0])
    assert (launch.nnodes, launch.nproc_per_node, launch.rdzv_backend) == ("1:2", "2", "c10d")
    assert (launch.rdzv_endpoint, launch.rdzv_id, launch.local_addr) == ("10.0.0.1:29400", "tiny", "10.0.0.2")
    assert launch.max_restarts > 0 and launch.rdzv_conf == "is_host=0" and seconds_to_save("torchrun.sh") > 30
    assert train["overrides"] == ["layout.shard=2", "train.steps=3"] and train["run"] == tmp_path / "runs/tiny"


def test_torchrun_script_asks_for_the_address_that_it_needs(stand_ins):
    stand_ins("torchrun")
    refused = subprocess.run([str(CLUSTER / "torchrun.sh")], capture_output=True, text=True)
    assert refused.returncode != 0 and "FIRST_HOST" in refused.stderr


# ---- Slurm

def directives():
    lines = (CLUSTER / "slurm.sbatch").read_text().splitlines()
    found = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    begin = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[begin:]), "sbatch reads no further"
    return dict(re.fullmatch(r"--([a-z-]+)(?:=(\S+))?", line).groups() for line in found)


def test_slurm_directives():
    known = directives()
    assert known["ntasks-per-node"] == "1", "one torchrun on each node"
    assert re.fullmatch(r"\d+:\d\d:\d\d", known["time"])
    shell_only, signal_name, seconds = re.fullmatch(r"(B):(USR1)@(\d+)", known["signal"]).groups()
    assert shell_only and signal_name and int(seconds) >= 60
    assert "requeue" in known and known["open-mode"] == "append", "a second start must not wipe the first one's log"


@pytest.fixture
def slurm(stand_ins, tmp_path):
    """Slurm for one node: srun runs its command, scancel signals it, scontrol writes down what is asked of it."""
    stand_ins("scontrol", 'case "$*" in "show hostnames"*) echo node-1; echo node-2;; *"show job"*) '
                          'echo "JobId=4711 PreemptTime=${PREEMPTED:-None}";; esac\n')
    stand_ins("srun", 'while [[ $1 == --* ]]; do shift; done\necho $$ > "$CALLS.step"\nexec "$@"\n')
    stand_ins("scancel", 'echo >> "$CALLS.tries"; [[ $(wc -l < "$CALLS.tries") -gt ${BUSY:-0} ]] || exit 1\n'
                         'kill -TERM "$(cat "$CALLS.step")"\n')
    stand_ins("torchrun", 'trap "exit 1" TERM\nfor ((n = 0; n < ${STEPS:-0}; n++)); do sleep 0.1; done\n')

    def start(run, **more):
        environment = os.environ | {
            "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "64", "SLURM_SUBMIT_DIR": str(tmp_path), "RUN": str(run)} | more
        return subprocess.Popen([str(CLUSTER / "slurm.sbatch")], env=environment)

    yield start


def torchrun_call(tmp_path):
    return next(call for call in calls(tmp_path) if call[0] == "torchrun")


def test_slurm_begins_a_run_where_there_is_none(slurm, tmp_path):
    assert slurm(tmp_path / "runs/new").wait(20) == 0
    launch, train = check_torchrun(torchrun_call(tmp_path))
    assert (launch.nnodes, launch.nproc_per_node, launch.rdzv_endpoint) == ("2", "8", "node-1:29400")
    assert launch.rdzv_id == "4711" and seconds_to_save("slurm.sbatch") < int(directives()["signal"].split("@")[1])
    assert train["recipe"] == "first" and not train["resume"]


def test_slurm_goes_on_with_a_run_that_exists(slurm, tmp_path):
    run = tmp_path / "runs/begun"
    run.mkdir(parents=True)
    (run / "recipe.yaml").touch()
    assert slurm(run).wait(20) == 0
    _, train = check_torchrun(torchrun_call(tmp_path))
    assert train["resume"] and train["run"] == run and not train["overrides"]


def told(slurm, tmp_path, number, **more):
    """The exit code of a job that got a signal while its step ran."""
    job = slurm(tmp_path / "runs/long", STEPS="200", **more)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not any("torchrun" in call for call in calls_so_far(tmp_path)):
        time.sleep(0.05)
    time.sleep(0.2)
    job.send_signal(number)
    return job.wait(20)


@pytest.mark.parametrize("number, queued", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_saves_when_told_and_queues_again_when_its_time_is_over(slurm, tmp_path, number, queued):
    code = told(slurm, tmp_path, number)
    assert ["scancel", "--signal=TERM", "4711"] in calls(tmp_path)
    assert (["scontrol", "requeue", "4711"] in calls(tmp_path)) == queued
    assert (code == 0) == queued


def test_slurm_asks_again_where_its_controller_is_busy(slurm, tmp_path):
    assert told(slurm, tmp_path, signal.SIGUSR1, BUSY="1") == 0
    assert calls(tmp_path).count(["scancel", "--signal=TERM", "4711"]) == 2
    assert ["scontrol", "requeue", "4711"] in calls(tmp_path)


def test_slurm_queues_again_what_was_preempted_without_a_word_to_the_shell(slurm, stand_ins, tmp_path):
    stand_ins("torchrun", "exit 1\n")
    assert slurm(tmp_path / "runs/preempted", PREEMPTED="2026-11-29T10:00:00").wait(20) == 0
    assert ["scontrol", "requeue", "4711"] in calls(tmp_path)


def test_slurm_gives_every_torchrun_the_processors_of_its_task(slurm, tmp_path):
    assert slurm(tmp_path / "runs/new").wait(20) == 0
    srun = next(call for call in calls(tmp_path) if call[0] == "srun")
    assert "--cpus-per-task=64" in srun[:srun.index("torchrun")]


def calls_so_far(tmp_path):
    return [call[:1] for call in calls(tmp_path)] if (tmp_path / "calls").exists() else []


def test_slurm_tells_of_a_failure(slurm, stand_ins, tmp_path):
    stand_ins("torchrun", "exit 3\n")
    assert slurm(tmp_path / "runs/failing").wait(20) == 3
    assert not any(call[:2] == ["scontrol", "requeue"] for call in calls(tmp_path))


# ---- Kubernetes

_JOB = {"nprocPerNode", "elasticPolicy", "runPolicy", "pytorchReplicaSpecs"}
_ELASTIC = {"rdzvBackend", "rdzvId", "rdzvHost", "rdzvPort", "rdzvConf", "minReplicas", "maxReplicas", "maxRestarts",
            "metrics", "standalone"}
_RUN = {"cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "schedulingPolicy",
        "suspend", "managedBy"}
_REPLICA = {"replicas", "restartPolicy", "template"}


def check_job(job):
    """The rules of Kubeflow's training operator, version 1 (pytorch_types.go, common_types.go and its validation)."""
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"]), "it becomes the name of a service"
    assert set(spec) <= _JOB and set(spec["elasticPolicy"]) <= _ELASTIC and set(spec["runPolicy"]) <= _RUN
    assert isinstance(spec["nprocPerNode"], str), "the field is a string"
    assert spec["elasticPolicy"]["rdzvBackend"] in ("c10d", "etcd", "etcd-v2")
    assert spec["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    assert set(spec["pytorchReplicaSpecs"]) == {"Worker"}, "an elastic job has no master"
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert set(worker) == _REPLICA and worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    elastic = spec["elasticPolicy"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    container, = (one for one in worker["template"]["spec"]["containers"] if one["name"] == "pytorch")
    assert all(isinstance(word, str) for word in [*container["command"], *container["args"]])
    assert any(port["name"] == "pytorchjob-port" for port in container["ports"])
    return spec, worker["template"]["spec"], container


def test_kubernetes_job_keeps_the_operators_rules():
    _, pod, container = check_job(JOB)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"], "several pods write"
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    paths = [word.partition("=")[2] for word in container["args"] if word.startswith("--run=")]
    paths += [variable["value"] for variable in container["env"] if variable["name"] == "DOUGONG_CACHE"]
    assert len(paths) == 2 and all(any(path.startswith(mount + "/") for mount in mounts) for path in paths)


def test_kubernetes_command_is_what_both_parsers_know():
    spec, pod, container = check_job(JOB)
    launch, train = check_torchrun(container["command"] + container["args"])
    assert launch.nproc_per_node == spec["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert 30 < int(variables[SHUTDOWN]) < pod["terminationGracePeriodSeconds"]
    assert set(container["resources"]["requests"]) == {"cpu", "memory"}, "without them it is evicted first"
    assert train["overrides"] == ["layout.shard=8"]


@pytest.mark.parametrize("breaking", [
    lambda job: job["spec"].update(nprocPerNode=8),
    lambda job: job["spec"].update(replicas=2),
    lambda job: job["spec"]["elasticPolicy"].update(minReplicas=3),
    lambda job: job["spec"]["pytorchReplicaSpecs"].update(Master={}),
    lambda job: job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0].update(name="main"),
    lambda job: job["metadata"].update(name="dougong_first"),
])
def test_the_rules_would_see_a_broken_job(breaking):
    job = yaml.safe_load(yaml.safe_dump(JOB))
    breaking(job)
    with pytest.raises((AssertionError, ValueError)):
        check_job(job)


def test_both_languages_show_the_same_commands():
    english, chinese = ((CLUSTER / name).read_text() for name in ("README.md", "README.zh-CN.md"))

    def commands(text):
        return {code for code in re.findall(r"`([^`]+)`", text.replace("\n", " ")) if " " in code or "=" in code}

    assert commands(english) == commands(chinese) and len(commands(english)) >= 6
