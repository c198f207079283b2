"""Bad input gets one readable screen, exit code 2 and no traceback, and nothing already made is lost."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_recipe import dougong, write_recipe, write_texts

from dougong.core import files
from dougong.core.events import read_events
from dougong.core.files import lock

ONE_SCREEN = 16   # lines


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run with what it was made from."""
    folder = tmp_path_factory.mktemp("made")
    os.environ["DOUGONG_CACHE"] = str(folder / "cache")
    recipe = write_recipe(folder / "tiny.yaml", write_texts(folder / "texts"))
    finished = dougong("train", recipe, "train.steps=8", "evaluate.baselines=false", "--run", folder / "run")
    assert finished.code == 0, finished.err
    yield folder
    os.environ.pop("DOUGONG_CACHE")


@pytest.fixture
def stopped(made, tmp_path, monkeypatch):
    """A run stopped at step 4, free to be spoilt."""
    from dougong.train.loop import fit

    def until_four(state, *arguments, **named):
        for result in fit(state, *arguments, **named):
            state.stop = "interrupted" if result.step == 4 else None
            yield result

    with monkeypatch.context() as patched:
        patched.setattr("dougong.recipes.train.fit", until_four)
        assert dougong("train", made / "tiny.yaml", "train.steps=8", "--run", tmp_path / "run").code == 0
    return tmp_path / "run"


def refused(*arguments, says):
    """Asserts a refusal that contains every word of `says`; returns its text."""
    outcome = dougong(*arguments)
    text = outcome.err
    assert outcome.code == 2, f"exit code {outcome.code}\n{outcome.out}\n{text}"
    assert "Traceback" not in text and "error:" in text.lower()
    assert not outcome.out.strip(), f"a refusal prints nothing to standard output:\n{outcome.out}"
    message = text[text.lower().rindex("error:"):]
    assert len(message.splitlines()) <= ONE_SCREEN, message
    for word in says:
        assert word in message, f"{word!r} is not said in:\n{message}"
    return message


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


# -- recipes and overrides ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "says"), [
    (["frist"], ["unknown recipe 'frist'", "'first'"]),
    (["nowhere.yaml"], ["no recipe file", "nowhere.yaml"]),
    (["first", "train.setps=3"], ["train.setps", "'steps'"]),
    (["first", "trian.steps=3"], ["trian", "'train'"]),
    (["first", "train.steps=0"], ["train.steps=0", "greater than or equal to 1"]),
    (["first", "train.steps=many"], ["train.steps='many'", "integer"]),
    (["first", "optim.lr=-1"], ["lr=-1", "greater than 0"]),
    (["first", "model=qwen4"], ["model family", "'qwen4'", "qwen3"]),
    (["first", "optim.kind=adamwx"], ["'adamwx'", "'adamw'"]),
    (["first", "tokenizer.kind=bpee"], ["'bpee'", "'bpe'"]),
    (["first", "size=huge"], ["size='huge'", "2M"]),
    (["first", "optim"], ["'optim'", "key=value"]),
    (["first", "evaluate.split=tset"], ["evaluate.split", "'test'"]),
    (["first", "runtime.device=tpu"], ["runtime.device", "'cuda'"]),
    (["first", "train.minutes=null", "train.steps=null", "size=null", "model.dim=32"], ["train.steps"]),
    (["digits_cnn", "train.steps=null"], ["how long to train", "train.minutes"]),
    (["digits_cnn", "size=2M"], ["size=2M", "language model"]),
    (["digits_cnn", "train.rows=100000"], ["100000 rows"]),
    (["digits_cnn", "train.micro_rows=8"], ["micro_rows=8", "BatchNorm"]),
    ([], ["dougong train first", "dougong recipes"]),
])
def test_a_recipe_that_cannot_be(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    refused("train", *arguments, says=says)
    assert list(tmp_path.iterdir()) == [], "a refused recipe left something behind"


@pytest.mark.parametrize(("content", "says"), [
    (b"base: first\ntrain: [", ["not YAML"]), (b"- 1\n", ["keys and values"]), (b"size: 2M\n", ["base: first"]),
    (b"base: frist\n", ["'frist'", "'first'"]), (b"\xff\xfe\x00", ["YAML"]), (b"", ["keys and values"])])
def test_a_recipe_file_that_is_none(tmp_path, content, says):
    (tmp_path / "mine.yaml").write_bytes(content)
    refused("show", tmp_path / "mine.yaml", says=says)


def test_a_recipe_file_that_is_its_own_base(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: mine.yaml\n")
    refused("show", tmp_path / "mine.yaml", says=["mine.yaml", "its own base"])
    (tmp_path / "one.yaml").write_text("base: two.yaml\n")
    (tmp_path / "two.yaml").write_text("base: one.yaml\n")
    refused("show", tmp_path / "one.yaml", says=["one.yaml", "two.yaml", "its own base"])


@pytest.mark.parametrize("layout", ["layout=3", "layout.kind=[1]"])
def test_a_layout_that_is_none(tmp_path, layout):
    refused("train", "--resume", "--run", tmp_path, layout, says=["layout"])


# -- data --------------------------------------------------------------------------------------------------------------

def _binary(folder):
    folder.mkdir()
    for name in ("a.bin", "b.dat"):
        (folder / name).write_bytes(bytes(range(256)) * 20)


def _small(folder):
    folder.mkdir()
    (folder / "a.txt").write_text("short\n")


@pytest.mark.parametrize(("make", "says"), [
    (lambda folder: None, ["texts"]),
    (lambda folder: folder.mkdir(), ["texts"]),
    (_binary, ["binary", "a.bin"]),
    (_small, ["too small", "Add text", "data.split.fractions"]),
], ids=["missing", "empty", "binary", "small"])
def test_data_that_cannot_be_trained_on(tmp_path, monkeypatch, make, says):
    monkeypatch.setenv("DOUGONG_CACHE", str(tmp_path / "cache"))
    make(tmp_path / "texts")
    recipe = write_recipe(tmp_path / "tiny.yaml", tmp_path / "texts")
    for command in (["train", recipe, "--run", tmp_path / "run"], ["train", recipe, "--dry-run"],
                    ["data", "prepare", recipe]):
        refused(*command, says=says)
    assert not (tmp_path / "run").exists()


def test_a_corpus_smaller_than_one_context(tmp_path, monkeypatch):
    monkeypatch.setenv("DOUGONG_CACHE", str(tmp_path / "cache"))
    _small(tmp_path / "texts")
    recipe = write_recipe(tmp_path / "tiny.yaml", tmp_path / "texts")
    refused("train", recipe, "data.split.fractions=[1,0,0]", "--run", tmp_path / "run",
            says=["7 tokens", "fewer than one context", "32"])
    assert not (tmp_path / "run").exists()


def test_invalid_utf8_beside_good_files_is_left_out_and_named(made, tmp_path):
    texts = tmp_path / "texts"
    shutil.copytree(made / "texts", texts)
    (texts / "bad.txt").write_bytes(b"good beginning \xff\xfe\xfa rest")
    outcome = dougong("data", "prepare", write_recipe(tmp_path / "tiny.yaml", texts), "--json")
    assert outcome.code == 0, outcome.err
    assert "bad.txt" in str(outcome.json["skipped"])
    assert outcome.json["documents"] == 60


def test_a_vocabulary_larger_than_the_data_supports(made, tmp_path):
    recipe = write_recipe(tmp_path / "tiny.yaml", made / "texts", tokenizer={"kind": "bpe", "vocab_size": 60_000})
    refused("train", recipe, "--run", tmp_path / "run", says=["60,000", "vocab_size"])
    assert not (tmp_path / "run").exists()


# -- runs and checkpoints ----------------------------------------------------------------------------------------------

def test_resuming_where_nothing_is(tmp_path):
    refused("train", "--resume", "--run", tmp_path / "none", says=["no run at", "dougong train first"])
    (tmp_path / "other").mkdir()
    refused("train", "--resume", "--run", tmp_path / "other", says=["not a run", "recipe.yaml"])
    for verb in ("eval", "generate", "report"):
        refused(verb, tmp_path / "none", says=["no run at"])


@pytest.mark.parametrize(("arguments", "says"), [
    (["train.steps=9"], ["'train.steps=9'", "new run"]),
    (["first"], ["'first'", "no effect"]),
    (["--seeds", 2], ["--seeds"]),
    (["--dry-run"], ["--dry-run"])])
def test_resuming_takes_no_changes(made, arguments, says):
    before = contents(made / "run")
    refused("train", "--resume", "--run", made / "run", *arguments, says=says)
    assert contents(made / "run") == before


def test_resuming_by_name_takes_no_changes_either(made, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused("train", "first", "--resume", "optim.lr=1", says=["'optim.lr=1'"])


def test_a_run_in_use(stopped):
    before = contents(stopped)
    with lock(stopped / ".lock", owner="dougong train"):
        refused("train", "--resume", "--run", stopped, says=["in use", f"process {os.getpid()}"])
    assert contents(stopped) == before
    assert dougong("train", "--resume", "--run", stopped).code == 0


def test_a_checkpoint_of_another_recipe(stopped):
    recipe = stopped / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("clip_norm: 1.0", "clip_norm: 0.5"))
    refused("train", "--resume", "--run", stopped, says=["another recipe"])
    assert (stopped / "checkpoints/step-000004/manifest.json").exists()


def test_a_gpu_that_is_full_is_told_with_what_takes_less(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")

    monkeypatch.setattr("dougong.recipes.recipe.load_recipe", full)
    refused("train", "first", says=["CUDA out of memory. Tried to allocate 2.00 GiB.", "micro_rows=1", "compress"])


def test_data_that_changed_since_the_run_was_made(made, tmp_path):
    texts = tmp_path / "texts"
    shutil.copytree(made / "texts", texts)
    recipe = write_recipe(tmp_path / "tiny.yaml", texts)
    assert dougong("train", recipe, "train.steps=4", "--run", tmp_path / "run").code == 0
    (texts / "new.txt").write_text("something else entirely, and quite long " * 20)
    refused("eval", tmp_path / "run", says=["have changed", "Put the files back"])
    assert dougong("generate", tmp_path / "run", "ab").code == 0, "writing needs no data"


def test_a_damaged_checkpoint_is_passed_over_and_all_damaged_is_refused(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    steps = sorted((tmp_path / "run/checkpoints").iterdir())
    model = bytearray((steps[-1] / "model.safetensors").read_bytes())
    model[-3] ^= 1
    (steps[-1] / "model.safetensors").write_bytes(model)
    assert len(steps) > 1
    for verb in ("eval", "generate"):
        assert dougong(verb, tmp_path / "run").code == 0
        refused(verb, tmp_path / "run", "--checkpoint", int(steps[-1].name[5:]), says=["damaged", "checksum"])
        refused(verb, steps[-1], says=["damaged"])
    for step in steps[:-1]:
        (step / "manifest.json").unlink()
    for verb in ("eval", "generate"):
        refused(verb, tmp_path / "run", says=["no valid checkpoint", "checksum"])
    refused("generate", tmp_path / "run", "--checkpoint", "7", says=["no checkpoint '7'"])


def test_what_only_training_reads_is_neither_read_nor_missed_by_others(made, tmp_path, monkeypatch):
    shutil.copytree(made / "run", tmp_path / "run")
    read, sha256 = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path.name) or sha256(path))
    assert dougong("generate", tmp_path / "run", "ab", "--seed", 1).code == 0
    assert "model.safetensors" in read and len(read) == len(set(read)), "each byte once"
    assert not any(name.startswith(("optimizer", "rng")) for name in read)
    for step in (tmp_path / "run/checkpoints").iterdir():
        (step / "optimizer.safetensors").write_bytes(b"torn")
    assert dougong("generate", tmp_path / "run", "ab").code == 0


def test_a_checkpoint_damaged_before_resuming_costs_only_its_steps(stopped):
    steps = sorted((stopped / "checkpoints").iterdir())
    (steps[-1] / "optimizer.safetensors").write_bytes(b"torn")
    resumed = dougong("train", "--resume", "--run", stopped, "--json")
    assert resumed.code == 0 and resumed.json["step"] == 8
    warnings = [e["message"] for e in read_events(stopped / "events.jsonl") if e["event"] == "warning"]
    assert any("passed over" in message and "optimizer" in message for message in warnings)


# -- disks -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 300 kB: a real full disk. Skipped where mounting is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_stops_with_one_message_and_keeps_what_was_written(made, small_disk):
    message = refused("train", made / "tiny.yaml", "--run", small_disk / "run", says=["the disk is full", "lost"])
    assert "Free some space" in message
    assert (small_disk / "run/recipe.yaml").exists()


def test_a_read_only_disk(made, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused("train", made / "tiny.yaml", "--run", small_disk / "run", says=["read-only"])
    refused("report", made / "run", "--out", small_disk / "page.html", says=["read-only"])


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"),
                                              (errno.EACCES, "permission")])
def test_a_disk_that_fails_in_the_middle_of_training(made, stopped, monkeypatch, number, says):
    """Every write fails from the first checkpoint on, the event log's too."""
    before = contents(stopped / "checkpoints")

    def fails(*_, **__):
        raise OSError(number, os.strerror(number), "somewhere")

    monkeypatch.setattr(sys.modules["dougong.train.checkpoint"], "write_tensors", fails)
    monkeypatch.setattr("dougong.core.events.EventLog.write", fails)
    refused("train", "--resume", "--run", stopped, says=[says])
    assert contents(stopped / "checkpoints") == before
    monkeypatch.undo()
    assert dougong("train", "--resume", "--run", stopped).code == 0


def test_the_cache_on_a_full_disk(made, small_disk, monkeypatch, tmp_path):
    monkeypatch.setenv("DOUGONG_CACHE", str(small_disk / "cache"))
    texts = write_texts(tmp_path / "texts", documents=300, words=500)
    refused("data", "prepare", write_recipe(tmp_path / "tiny.yaml", texts), says=["the disk is full"])


def test_a_run_where_a_file_is(made, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    refused("train", made / "tiny.yaml", "--run", tmp_path / "file" / "run", says=["a file, not a folder"])
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_pipe_that_closes_early_is_no_error(made):
    process = subprocess.Popen([sys.executable, "-m", "dougong", "recipes"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait() in (0, 1)


def test_a_run_without_words_cannot_write_and_echoes_nothing(tmp_path):
    run = str(tmp_path / "line")
    assert dougong("train", "linear_regression", "train.steps=5", "runtime.threads=1", "--run", run).code == 0
    refused("generate", run, "hi", says=["holds no language model", "model.kind=linear"])
