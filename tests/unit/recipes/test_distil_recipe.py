"""A student taught by a run: its tokenizer, its answers at hand or on disk, and what is refused."""

import dataclasses
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from tiny_recipe import MODELS, dougong, write_recipe, write_texts

from dougong.adapt.teacher_cache import Answers, predict_seconds, write_answers
from dougong.core.config import replace
from dougong.core.run import RunDirectory
from dougong.data.tokenizer import Tokenizer
from dougong.objectives.divergence import top_of
from dougong.recipes.assemble import assemble, prepare_data
from dougong.recipes.derive import resolve
from dougong.recipes.open_run import open_run
from dougong.recipes.recipe import load_recipe, recipe_from_run
from dougong.recipes.teacher import answers_of, open_teacher
from dougong.runtime.device import Runtime

QUIET = ["evaluate.baselines=false", "sample.prompts=[]", "train.ema=null", "train.evaluate_every=12"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with texts, a teacher of bytes, and the recipe of a student."""
    root = tmp_path_factory.mktemp("distil")
    patch = pytest.MonkeyPatch()
    patch.setenv("DOUGONG_CACHE", str(root / "cache"))
    texts = write_texts(root / "texts", documents=24, words=30)
    recipe = write_recipe(root / "teacher.yaml", texts, model={**MODELS["qwen3"], "dim": 48, "context": 64})
    assert dougong("train", recipe, "--run", root / "teacher", *QUIET, "train.steps=12").code == 0
    student = yaml.safe_load(write_recipe(root / "student.yaml", texts, model=MODELS["qwen3"]).read_text())
    del student["tokenizer"]
    (root / "student.yaml").write_text(yaml.safe_dump({**student, "base": "distil", "objective": {
        "teacher": str(root / "teacher"), "checkpoint": "last"}}))
    yield root
    patch.undo()


def recipe_of(root, *changes):
    return resolve(load_recipe(str(root / "student.yaml"), [*QUIET, *changes])[0])[0]


def train(root, path, *changes):
    return dougong("train", root / "student.yaml", "--run", path, "--json", *QUIET, "train.steps=6", *changes)


def events(path):
    return [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]


def test_a_student_takes_its_teachers_tokenizer_and_tells_how_near_it_is(root, tmp_path):
    done = train(root, tmp_path / "run")
    assert done.code == 0, done.err
    recipe, recorded = recipe_from_run(RunDirectory(tmp_path / "run").recipe)
    assert recipe.tokenizer.path == str(root / "teacher" / "tokenizer")
    assert len(recorded["teacher_fingerprint"]) == 64
    steps = [event for event in events(tmp_path / "run") if event["event"] == "step"]
    assert {"divergence", "agreement", "loss", "accuracy"} <= steps[-1].keys() | steps[-1].get("metrics", {}).keys()
    assert done.json["result"]["bits_per_byte"] > 0
    assert open_run(tmp_path / "run").model.config.dim == 32


@pytest.mark.parametrize("tokens", [1, 100, 1 << 20])
def test_the_time_of_asking_is_predicted_from_any_number_of_blocks(root, monkeypatch, tokens):
    """Of one block tried, some of them, and all."""
    monkeypatch.setattr("dougong.adapt.teacher_cache._TRIED_TOKENS", tokens)
    recipe = recipe_of(root, "objective.top_k=3", "objective.temperature=1.7")
    plan = answers_of(recipe, teacher := open_teacher(recipe.objective, Runtime()), prepare_data(recipe))
    assert predict_seconds(plan, teacher.model, Runtime()) > 0 and not plan.directory.exists()
    write_answers(plan, teacher.model, Runtime())
    assert predict_seconds(plan, teacher.model, Runtime()) == 0
    shutil.rmtree(plan.directory)


@pytest.mark.parametrize("kept", ["objective.top_k=8", "objective.align=bytes"])
def test_a_dry_run_asks_the_teacher_a_little_and_writes_nothing(root, kept, monkeypatch, tmp_path):
    monkeypatch.setenv("DOUGONG_CACHE", str(tmp_path / "cache"))
    told = dougong("train", root / "student.yaml", "--dry-run", "--json", *QUIET, kept)
    assert told.code == 0, told.err
    assert told.json["teacher_seconds"] > 0 and told.json["recipe"]["objective"]["kind"] == "distil"
    assert told.json["teacher_answers_bytes"] >= 257 * 2 if kept.endswith("bytes") else 8 * 4
    assert not (tmp_path / "cache" / "teachers").exists()


@pytest.mark.parametrize("changes", [
    (), ("objective.top_k=8",), ("objective.match={stack.0: stack.1}",),
    ("objective.hard=0", "objective.divergence=reverse", "objective.on_policy.prompt_tokens=8", "train.rows=4")])
def test_interrupted_is_uninterrupted(root, tmp_path, changes):
    """The same weights, bit for bit, whether the run stopped in the middle or not."""
    from safetensors.torch import load_file

    whole = train(root, tmp_path / "whole", "train.checkpoint_every=3", *changes)
    assert whole.code == 0, whole.err
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", again)
    shutil.rmtree(again / "checkpoints" / "step-000006")
    kept = [line for line in (again / "events.jsonl").read_text().splitlines()
            if json.loads(line)["event"] not in ("end", "result")]
    (again / "events.jsonl").write_text("\n".join(kept) + "\n")
    resumed = dougong("train", "--resume", "--run", again)
    assert resumed.code == 0, resumed.err
    a, b = (sorted((path / "checkpoints" / "step-000006").glob("*model*.safetensors"))
            for path in (tmp_path / "whole", again))
    assert a and len(a) == len(b)
    for one, other in zip(a, b):
        torch.testing.assert_close(load_file(one), load_file(other), rtol=0, atol=0)


def test_projections_are_trained_and_saved_but_are_no_part_of_the_opened_model(root, tmp_path):
    done = train(root, tmp_path / "run", "objective.match={stack.0: stack.1}")
    assert done.code == 0, done.err
    from safetensors import safe_open

    names = {name for file in (tmp_path / "run" / "checkpoints" / "step-000006").glob("*.safetensors")
             for name in safe_open(file, "pt").keys()}  # noqa: SIM118
    assert any("companion.stack-0.weight" in name for name in names)
    opened = open_run(tmp_path / "run")
    assert not hasattr(opened.model, "companion")
    exported = dougong("export", tmp_path / "run", "--to", "hf", "--out", tmp_path / "hf", "--json")
    assert exported.code == 0, exported.err


def answers(root, *changes):
    recipe = recipe_of(root, *changes)
    corpus, runtime = prepare_data(recipe), Runtime()
    teacher = open_teacher(recipe.objective, runtime)
    plan = answers_of(recipe, teacher, corpus)
    return recipe, corpus, teacher, plan


def by_hand(corpus, teacher, context):
    """The teacher's logits after every token, each document read whole or in overlapping windows, place by place."""
    store, half, rows = corpus.tokens("train"), context // 2, []
    for document in store.documents():
        ids, read = torch.from_numpy(document.tokens.astype(np.int64)), {}
        for place in range(len(ids)):
            if place < context:
                end = min(len(ids), context)
            else:
                end = min(len(ids), context + ((place - context) // half + 1) * half)
            begin = max(0, end - context)
            if begin not in read:
                with torch.no_grad():
                    read[begin] = teacher.model(ids[None, begin:end])[0]
            rows.append(read[begin][place - begin])
    return torch.stack(rows)


def test_answers_on_disk_are_what_the_teacher_says_of_each_place(root):
    _, corpus, teacher, plan = answers(root, "objective.top_k=5", "objective.temperature=2")
    predicted = plan.bytes
    write_answers(plan, teacher.model, Runtime())
    size = {path.name: path.stat().st_size for path in plan.directory.glob("*.bin")}
    assert sum(size.values()) == predicted == plan.tokens * (5 * 2 + 6 * 2)
    at = np.arange(0, plan.tokens)[None]
    found = Answers(plan).fields(at)
    ids, log_p = top_of(by_hand(corpus, teacher, plan.context), 5, 2.0)
    told = torch.from_numpy(found["teacher_log_p"][0].astype(np.float32))
    torch.testing.assert_close(told, log_p, rtol=2e-3, atol=2e-3)      # float16 on disk
    same = torch.from_numpy(found["teacher_ids"][0]).long() == ids
    assert same.float().mean() > 0.99       # but for ties


@pytest.mark.parametrize("k", [3, 300])
def test_rows_of_the_teacher_without_a_token_are_never_among_its_answers(root, k):
    recipe, corpus, teacher, _ = answers(root, f"objective.top_k={k}")
    tokens, wide = teacher.tokenizer.vocab_size, replace(teacher.model.config, vocab_size=300, tied=False).build()
    wide.initialise(0)
    with torch.no_grad():
        wide.head.weight[tokens:] *= 100        # what has no token may be as likely as it wants
    plan = answers_of(recipe, dataclasses.replace(teacher, model=wide, fingerprint="wide"), corpus)
    write_answers(plan, wide, Runtime())
    found = Answers(plan).fields(np.arange(plan.tokens)[None])
    assert found["teacher_ids"].shape[-1] == min(k, tokens) and found["teacher_ids"].max() < tokens
    total = np.exp(found["teacher_log_p"][0].astype(np.float64)).sum(-1)
    np.testing.assert_allclose(total, 1, rtol=1e-2)


def test_rows_of_every_phase_find_the_answers_of_their_own_tokens(root):
    _, corpus, teacher, plan = answers(root, "objective.top_k=300")
    write_answers(plan, teacher.model, Runtime())
    at_hand = by_hand(corpus, teacher, plan.context).log_softmax(-1)
    store = corpus.tokens("train")
    everything = store.read(0, store.tokens)
    for pack in corpus._packs["train"].values():
        for phase in (0, 7):
            rows = np.arange(min(pack.rows, 6))
            fields, places = pack.fields(rows, phase), pack.places(rows, phase)
            told = fields["weight"] > 0
            np.testing.assert_array_equal(everything[places][told], fields["tokens"][told])
            answer = Answers(plan).fields(places)
            full = np.full((*places.shape, at_hand.shape[-1]), np.nan, np.float32)
            np.put_along_axis(full, answer["teacher_ids"].astype(np.int64), answer["teacher_log_p"].astype(np.float32),
                              -1)
            torch.testing.assert_close(torch.from_numpy(full[told]), at_hand[torch.from_numpy(places[told])],
                                       rtol=2e-3, atol=5e-3)


def test_interrupted_inference_goes_on_and_ends_with_the_same_files(root, monkeypatch):
    import dougong.adapt.teacher_cache as cache

    monkeypatch.setattr(cache, "_BLOCKS_AT_ONCE", 8)
    _, _, teacher, plan = answers(root, "objective.top_k=3")
    write_answers(plan, teacher.model, Runtime())
    whole = {path.name: path.read_bytes() for path in plan.directory.glob("*.bin")}
    shutil.rmtree(plan.directory)
    ask, calls = cache._answer, Counter()

    def dying(*arguments):
        calls["groups"] += 1
        if calls["groups"] == 3:
            raise KeyboardInterrupt
        ask(*arguments)

    monkeypatch.setattr(cache, "_answer", dying)
    with pytest.raises(KeyboardInterrupt):
        write_answers(plan, teacher.model, Runtime())
    assert not plan.is_written
    calls["groups"] = 100
    write_answers(plan, teacher.model, Runtime())
    groups = calls["groups"] - 100
    assert plan.is_written and groups == -(-len(cache._Reading(plan).blocks) // 8) - 2     # two were done
    assert {path.name: path.read_bytes() for path in plan.directory.glob("*.bin")} == whole
    said = []
    write_answers(plan, teacher.model, Runtime(), progress=lambda *what: said.append(what))
    assert said == []       # asked once


def test_training_on_answers_of_whole_documents_is_training_with_the_teacher_at_hand(root):
    """Documents that fit a row, every token of the vocabulary kept: only float16 lies between the two."""
    live, kept = (recipe_of(root, "model.context=64", "data.pack=best_fit", *more)
                  for more in ((), ("objective.top_k=300",)))
    live, kept = (replace(recipe, data=replace(recipe.data, path=str(short_texts(root)))) for recipe in (live, kept))
    losses = []
    for recipe in (live, kept):
        built = assemble(recipe, prepare_data(recipe))
        found = built.objective.losses(built.state.model.eval(), next(built.state.loader))
        stem = list(built.state.model.stem.parameters())
        losses.append((found.sums["model"], torch.autograd.grad(found.sums["model"], stem)))
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(losses[0][1], losses[1][1], rtol=1e-2, atol=1e-2)


def short_texts(root):
    folder = root / "short"
    if not folder.is_dir():
        folder.mkdir()
        for number in range(60):
            (folder / f"{number}.txt").write_text(f"{number} short text {number * 7919 % 1000}")
    return folder


@pytest.mark.parametrize("begins", [None, "z"], ids=["as it ends", "otherwise than it ends"])
def test_next_bytes_are_kept_where_both_tokenizers_have_a_border(root, tmp_path, begins):
    """Student of words (BPE), teacher of bytes: every border of the student is one of the teacher."""
    _, corpus, teacher, plan = answers(root, "objective.align=bytes", "tokenizer.kind=bpe",
                                       "tokenizer.vocab_size=400")
    if begins:
        its = teacher.tokenizer
        its = Tokenizer(its.backend, document_id=its.document_id, settings={"bos_token": begins})
        plan = dataclasses.replace(plan, tokenizer=its, directory=tmp_path)
    write_answers(plan, teacher.model, Runtime())
    found = Answers(plan).fields(np.arange(plan.tokens)[None])["teacher_bytes"][0]
    assert not np.isnan(found).any()
    # the teacher's own distribution over bytes at the same place of the first document
    text = corpus.documents("train")[0].text.encode()
    ids = torch.tensor([ord(begins) if begins else teacher.tokenizer.document_id, *text])
    ours = corpus.tokens("train").read(0, 12)
    with torch.no_grad():
        theirs = teacher.model(ids[None, :plan.context])[0].softmax(-1)
    at = 0
    for number, token in enumerate(ours):
        at += len(corpus.tokenizer.decode_bytes([int(token)]))
        expected = torch.cat([theirs[at, :256], theirs[at, 256:].sum()[None]])
        torch.testing.assert_close(torch.from_numpy(found[number].astype(np.float32)).exp(), expected, rtol=5e-3,
                                   atol=1e-4)


def test_places_without_a_common_border_say_nothing(root):
    """Student of bytes, teacher of words: inside the teacher's words there is nothing to compare."""
    texts = root / "texts"
    words = write_recipe(root / "words.yaml", texts, model=MODELS["qwen3"],
                         tokenizer={"kind": "bpe", "vocab_size": 400})
    assert dougong("train", words, "--run", root / "words", *QUIET, "train.steps=6").code == 0
    changes = [f"objective.teacher={root / 'words'}", "objective.align=bytes", "tokenizer.kind=bytes"]
    recipe, corpus, teacher, plan = answers(root, *changes)
    write_answers(plan, teacher.model, Runtime())
    silent = np.isnan(Answers(plan).fields(np.arange(plan.tokens)[None])["teacher_bytes"][0, :, 0])
    store, borders = corpus.tokens("train"), []
    for number in range(len(store)):
        theirs = teacher.tokenizer.encode(corpus.documents("train")[number].text)
        ends = np.cumsum([0, *(len(teacher.tokenizer.decode_bytes([int(token)])) for token in theirs)])
        length = int(store.starts[number + 1] - store.starts[number])
        borders.append(~np.isin(np.arange(length), ends))
    np.testing.assert_array_equal(silent, np.concatenate(borders))
    assert 0.2 < silent.mean() < 0.95
    built = assemble(recipe, corpus)
    found = built.objective.losses(built.state.model, next(built.state.loader))
    assert found.sums["model"].isfinite() and found.metrics["divergence"] > 0


def test_other_tokenizers_are_refused_and_the_answer_names_both_and_a_way(root, tmp_path):
    refused = train(root, tmp_path / "run", "tokenizer.kind=bpe", "tokenizer.vocab_size=400")
    assert refused.code == 2 and "Traceback" not in refused.err
    assert "bpe of 400 tokens" in refused.err and "bytes of 257" in refused.err and "align=bytes" in refused.err


def test_what_cannot_be_is_refused_with_a_way_out(root, tmp_path):
    for changes, says in [(("objective.teacher=null",), "objective.teacher=RUN"), (("model.context=128",), "reads 64"),
                          (("objective.match={stack.9: stack.0}",), "no part 'stack.9'"),
                          (("objective.on_policy.prompt_tokens=99", "objective.hard=0"), "prompt_tokens=99")]:
        refused = train(root, tmp_path / "run", *changes)
        assert refused.code == 2 and says in refused.err and "Traceback" not in refused.err, (changes, refused.err)


def test_a_teacher_that_changed_stops_a_run_that_goes_on(root, tmp_path):
    shutil.copytree(root / "teacher", tmp_path / "teacher")
    done = train(root, tmp_path / "run", f"objective.teacher={tmp_path / 'teacher'}", "train.checkpoint_every=3")
    assert done.code == 0, done.err
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    log = tmp_path / "run" / "events.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines()
                           if json.loads(line)["event"] not in ("end", "result")))
    shutil.rmtree(tmp_path / "teacher" / "checkpoints" / "step-000012")
    refused = dougong("train", "--resume", "--run", tmp_path / "run")
    assert refused.code == 2 and "teacher of this run has changed" in refused.err, refused.err


def test_on_policy_rows_are_the_students_own_from_the_prompt_on(root):
    recipe = recipe_of(root, "objective.hard=0", "objective.on_policy.prompt_tokens=8", "objective.on_policy.share=0.5",
                       "train.rows=4", "train.micro_rows=4")
    built = assemble(recipe, prepare_data(recipe))
    loader = built.state.loader
    text, batch = loader._inner.batch(0), loader.batch(0)
    assert (batch["tokens"][:2, :8] == text["tokens"][:2, :8]).all()
    for name in ("tokens", "targets", "weight"):
        torch.testing.assert_close(batch[name][2:], text[name][2:])
    assert (batch["weight"][:2, :7] == 0).all() and (batch["weight"][:2, 7] == 1).all()
    inside = batch["weight"][:2, 1:] > 0
    assert (batch["tokens"][:2, 1:][inside] == batch["targets"][:2, :-1][inside]).all()
    again = loader.batch(0)
    assert all((again[name] == batch[name]).all() for name in batch)
    with torch.no_grad():
        built.state.model.stem.tokens.weight.normal_()
    assert (loader.batch(0)["tokens"][:2] != batch["tokens"][:2]).any()     # the model as it is now
