"""Files of a stopped run that are cut short or have one bit turned: never trusted, never silently used."""

import random
import shutil
import signal
from functools import partial

import faults
import pytest
from ends import RunDirectory, assert_same_end, starts, warnings
from lives import Life

STOPPED_AT = 33     # checkpoints of steps 30 and 33


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    place = random.Random(file.name).randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)


def cut_in_half(file):
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


DAMAGES = [flip_a_bit, cut_in_half, empty]


@pytest.fixture(scope="module")
def stopped(lab, reference):
    """A run stopped in the middle by SIGTERM."""
    stop = partial(faults.at_step, STOPPED_AT, partial(faults.stop_with, signal.SIGTERM))
    ended = Life(lab, "train", lab / "tiny.yaml", "--run", lab / "stopped", fault=stop).end()
    assert ended.code == 0, ended.err
    run = RunDirectory(lab / "stopped")
    assert run.checkpoint_steps()[-1] == STOPPED_AT
    return run


@pytest.fixture
def again(lab, stopped):
    """Makes copies of the stopped run; they are removed at the end."""
    made = []

    def copy():
        made.append(RunDirectory(lab / f"copy-{len(made)}"))
        shutil.copytree(stopped.path, made[-1].path)
        return made[-1]

    yield copy
    for run in made:
        shutil.rmtree(run.path)


def resume(lab, run):
    return Life(lab, "train", "--resume", "--run", run.path).end()


@pytest.mark.chaos("a flipped bit, half a file or an empty one, in each file of the newest checkpoint",
                   must="the checkpoint is passed over, the run says so, goes on from the one before, ends as the "
                        "uninterrupted run")
def test_damaged_checkpoint(lab, reference, stopped, again, told, request):
    names = sorted(path.name for path in stopped.checkpoint(STOPPED_AT).iterdir())
    assert {"model.safetensors", "optimizer.safetensors", "manifest.json"} <= set(names)
    cases = [(name, damage) for name in names for damage in DAMAGES]
    if request.config.getoption("--kills") < 100:
        cases = [(name, DAMAGES[number % len(DAMAGES)]) for number, name in enumerate(names)]
    for name, damage in cases:
        run = again()
        damage(run.checkpoint(STOPPED_AT) / name)
        ended = resume(lab, run)
        assert ended.code == 0, f"{damage.__name__} of {name}:\n{ended.err}"
        assert 0 < starts(run)[-1] < STOPPED_AT, f"{damage.__name__} of {name} went unseen"
        assert any(f"step-{STOPPED_AT:06d}" in warning for warning in warnings(run)), warnings(run)
        assert_same_end(run, reference)
    told(f"{len(cases)} damages of {len(names)} files found, all passed over")


@pytest.mark.chaos("every checkpoint damaged",
                   must="training begins again, says so, and ends as the uninterrupted run")
def test_all_checkpoints_damaged(lab, reference, again, told):
    run = again()
    for step in run.checkpoint_steps():
        flip_a_bit(run.checkpoint(step) / "model.safetensors")
    ended = resume(lab, run)
    assert ended.code == 0, ended.err
    assert starts(run)[-1] == 0 and any("begins again" in warning for warning in warnings(run))
    assert_same_end(run, reference)
    told(f"{len(run.checkpoint_steps())} passed over, begun again at step 0")


@pytest.mark.chaos("a flipped bit, half a file or an empty one, in the recipe and the vocabulary of the run",
                   must="a clear error, nothing changed; the file put back, the run ends as the uninterrupted one")
def test_damaged_recipe_and_vocabulary(lab, reference, again, told):
    run = again()
    cases = [(file, damage) for file in (run.recipe, run.tokenizer / "tokenizer.json") for damage in DAMAGES]
    for file, damage in cases:
        before = file.read_bytes()
        damage(file)
        ended = resume(lab, run)
        assert ended.code == 2 and "error:" in ended.err, f"{damage.__name__} of {file.name}: {ended}"
        assert "Traceback" not in ended.err, ended.err
        file.write_bytes(before)
    assert resume(lab, run).code == 0
    assert_same_end(run, reference)
    told(f"{len(cases)} of {len(cases)} refused with exit code 2")


@pytest.mark.chaos("the event log torn in the middle of a line",
                   must="the line is left out, the run ends as the uninterrupted one")
def test_torn_event_log(lab, reference, again, told):
    run = again()
    run.events.write_bytes(run.events.read_bytes()[:-40])
    assert resume(lab, run).code == 0
    assert_same_end(run, reference)
    told("40 bytes cut off its end")


@pytest.mark.chaos("the whole cache deleted between stop and resume (documents, tokenizer, tokens)",
                   must="prepared again, and ends as the uninterrupted run")
def test_deleted_cache(lab, reference, again, told):
    run = again()
    ended = Life(lab, "train", "--resume", "--run", run.path, environment={"DOUGONG_CACHE": str(lab / "fresh")}).end()
    assert ended.code == 0, ended.err
    assert_same_end(run, reference)
    files = sum(path.is_file() for path in (lab / "fresh").rglob("*"))
    told(f"{files} files made again")


@pytest.mark.chaos("a file of the training texts changed between stop and resume",
                   must="a clear error, nothing changed; the file put back, the run ends as the uninterrupted one")
def test_changed_data(lab, reference, again, told):
    run, text = again(), lab / "texts" / "007.txt"
    before = text.read_bytes()
    try:
        text.write_bytes(before + b"one more line\n")
        ended = resume(lab, run)
        assert ended.code == 2 and "have changed" in ended.err, ended
    finally:
        text.write_bytes(before)
    assert resume(lab, run).code == 0
    assert_same_end(run, reference)
    told("refused with exit code 2, naming both fingerprints")
