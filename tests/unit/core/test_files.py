"""Files are whole or absent, events survive torn lines, runs are never overwritten."""

import errno
import os
import socket
import subprocess
import sys
import threading

import pytest

from dougong.core import files
from dougong.core.errors import CheckpointError, DougongError
from dougong.core.events import EventLog, last_per_step, read_events
from dougong.core.run import RunDirectory


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})

    def no_space(_handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(DougongError, match="the disk is full"), files.explained_disk_errors("x.json"):
        files.write_json(path, {"a": 2})
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize(("number", "says"), [(errno.EACCES, "permission was denied"), (errno.EPERM, "permission"),
                                              (errno.ENOTDIR, "not a folder"), (errno.ENAMETOOLONG, "too long")])
def test_a_path_that_cannot_be_used_is_named_without_a_word_of_space_or_of_writing_alone(number, says):
    with pytest.raises(DougongError, match=f"cannot read or write model.safetensors: .*{says}") as told, \
            files.explained_disk_errors("the output"):
        raise OSError(number, os.strerror(number), "model.safetensors")
    assert "space" not in str(told.value) and "lost" not in str(told.value)


def test_a_folder_is_not_written_over(tmp_path):
    with pytest.raises(DougongError, match="is a folder, and a file is to be written there"):
        files.write_text(tmp_path, "page")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_what_helps(tmp_path, monkeypatch, number):
    import fcntl

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DougongError, match=f"{tmp_path} knows no locks.*\n.*DOUGONG_CACHE") as told, \
            files.lock(tmp_path / ".lock", owner="me"):
        pytest.fail("it went on without a lock")
    assert not isinstance(told.value, CheckpointError), "the cache waits for that: for ever"


def test_a_lock_is_exclusive_and_freed_with_its_process(tmp_path):
    script = ("import sys, time; from pathlib import Path; from dougong.core.files import lock\n"
              f"with lock(Path({str(tmp_path / '.lock')!r}), owner='a training'):\n"
              "    print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match=f"in use by a training, process {holder.pid}"), \
            files.lock(tmp_path / ".lock", owner="me"):
        pass
    threading.Timer(0.3, holder.kill).start()
    with files.lock(tmp_path / ".lock", owner="me", patience_s=30):
        assert f"process {os.getpid()} on {socket.gethostname()}" in (tmp_path / ".lock").read_text()
    holder.wait()
    with files.lock(tmp_path / ".lock", owner="me"):
        pass


def test_events_count_attempts_and_survive_a_torn_line(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    for step in (1, 2):
        log.write("step", step=step, loss=float(step))
    log.close()
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'{"event": "step", "st')
    log = EventLog(tmp_path / "events.jsonl")
    log.write("step", step=2, loss=float("nan"))
    log.write("warning", message="w")
    log.close()
    events = read_events(tmp_path / "events.jsonl")
    assert [event["attempt"] for event in events] == [1, 1, 2, 2]
    kept = last_per_step(events)
    assert [(event["event"], event.get("loss")) for event in kept] == [("step", 1.0), ("step", None), ("warning", None)]


def test_a_second_run_of_one_name_gets_a_number(tmp_path):
    names = [RunDirectory.create(tmp_path, "first").path.name for _ in range(3)]
    assert names == ["first", "first-2", "first-3"]


def test_opening_what_is_no_run_says_what_there_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunDirectory.create(tmp_path, "mine")
    run.recipe.write_text("name: mine\n")
    with pytest.raises(CheckpointError, match=r"no run at .*other[\s\S]*mine"):
        RunDirectory.open(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"no recipe\.yaml"):
        RunDirectory.open(tmp_path)
    for typed, hub in (("Qwen/Qwen3-0.6B", True), ("runs/nothing", False), (tmp_path / "other", False)):
        with pytest.raises(CheckpointError, match="no run at") as refused:
            RunDirectory.open(typed)
        assert (f"To fetch it from a hub: hf:{typed}" in str(refused.value)) == hub
        assert ("dougong train first" in str(refused.value)) != hub
    (run.checkpoints / "step-000010").mkdir(parents=True)
    (run.checkpoints / ".step-000020.tmp").mkdir()
    assert RunDirectory.open(run.path).checkpoint_steps() == [10]
