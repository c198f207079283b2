"""A trained run leaves home and is inspected on the way: export, import, inspect as people and programs meet them."""

import contextlib
import io
import json
import os
import shutil

import jaxtyping
import pytest
from tiny_recipe import MODELS, dougong, write_recipe, write_texts

pytest.importorskip("transformers")
BPE = {"kind": "bpe", "vocab_size": 320}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of six steps, and beside it one of a model that has no published form."""
    folder = tmp_path_factory.mktemp("made")
    os.environ["DOUGONG_CACHE"] = str(folder / "cache")
    write_texts(folder / "texts")
    for kind in ("qwen3", "nano"):
        recipe = write_recipe(folder / f"{kind}.yaml", folder / "texts", model=MODELS[kind], tokenizer=BPE)
        finished = dougong("train", recipe, "train.steps=6", "evaluate.baselines=false", "--run", folder / kind)
        assert finished.code == 0, finished.err
    yield folder
    os.environ.pop("DOUGONG_CACHE")


def test_a_run_leaves_as_hf_and_says_what_it_is(made, tmp_path):
    outcome = dougong("export", made / "qwen3", "--out", tmp_path / "out", "--license", "mit", "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.json
    assert found["verified"]["reader"] == "transformers" and found["verified"]["largest_difference"] < 2e-6
    card = (tmp_path / "out/README.md").read_text()
    score = dougong("eval", made / "qwen3", "--no-baselines", "--json").json
    for told in ("license: mit", "step 6", f"{score['bits_per_byte']:.4f}", "95 % interval", "| train | 53 |",
                 "bos_token", "At 28,896 parameters", "kind: qwen3"):
        assert told in card, told
    assert str(made) not in card, "a card is published, and paths name people"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_the_snippet_of_the_card_runs(made, tmp_path, monkeypatch):
    assert dougong("export", made / "qwen3", "--out", tmp_path / "out", "--no-verify").code == 0
    code = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    exec(compile(code, "card", "exec"), {})


def test_greedy_text_is_the_same_in_transformers(made, tmp_path):
    import transformers

    assert dougong("export", made / "qwen3", "--out", tmp_path / "out").code == 0
    ours = dougong("generate", made / "qwen3", "abc", "--tokens", 12, "--temperature", 0, "--json").json
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = tokenizer(tokenizer.bos_token + "abc", return_tensors="pt")
    theirs = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    assert theirs.tolist() == ours["generations"][0]["tokens"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--to", "gguf", "--dtype", "bf16"], "--dtype bf16 has no effect with --to gguf. Use --quant"),
    (["--to", "onnx", "--quant", "q8_0"], "--quant q8_0 has no effect with --to onnx. Use --dtype"),
    (["--quant", "q8_0"], "--quant q8_0 has no effect with --to hf. Use --dtype"),
    (["--checkpoint", "99"], "no checkpoint '99'")])
def test_options_without_an_effect_are_refused(made, tmp_path, arguments, message):
    outcome = dougong("export", made / "qwen3", "--out", tmp_path / "out", *arguments)
    assert outcome.code == 2 and message in outcome.err and not (tmp_path / "out").exists()


def test_a_run_leaves_from_inside_it_and_never_into_the_folder_one_is_in(made, tmp_path, monkeypatch):
    run, empty = shutil.copytree(made / "qwen3", tmp_path / "run"), tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(run)
    for command in ("export", "compress"):
        done = dougong(command, ".", *(["--no-verify"] if command == "export" else []))
        assert done.code == 0, done.err
    monkeypatch.chdir(empty)
    refused = dougong("export", "../run", "-o", ".", "--no-verify")
    assert refused.code == 2 and "--out . is the folder you are in" in refused.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "run", "run-hf", "run-int8"]


def test_names_in_brackets_are_told_as_they_are(made, tmp_path):
    run = shutil.copytree(made / "qwen3", tmp_path / "r[/v2]")
    outcome = dougong("export", run, "--out", tmp_path / "o[v2]", "--no-verify")
    assert outcome.code == 0 and "o[v2]" in "".join(outcome.out.split()), outcome.err
    outcome = dougong("eval", run, "--no-baselines")
    assert outcome.code == 0 and "r[/v2]" in "".join(outcome.out.split()), outcome.err
    outcome = dougong("compress", run, "--out", tmp_path / "c[v2]")
    assert outcome.code == 0 and "c[v2]" in "".join(outcome.out.split()), outcome.err


def test_a_model_without_a_published_form_is_refused_by_name(made, tmp_path):
    for to in ("hf", "gguf"):
        outcome = dougong("export", made / "nano", "--out", tmp_path / "out", "--to", to)
        assert outcome.code == 2 and "residual=x0" in outcome.err and "model.kind=qwen3" in outcome.err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_shape_checks():
    """Lengths are symbols while a model is traced, and the checks of every test know numbers only."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_a_model_without_a_published_form_leaves_as_onnx_and_writes_the_same(made, tmp_path, no_shape_checks):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    outcome = dougong("export", made / "nano", "--to", "onnx", "--out", tmp_path / "out", "--license", "mit", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["verified"]["tokens"] > 300 and "nano is no published family" in outcome.json["notes"][0]
    found = dougong("inspect", tmp_path / "out", "--json")
    assert found.code == 0 and found.json["kind"] == "ONNX model" and found.json["facts"]["family"] == "nano"
    said = dougong("inspect", tmp_path / "out").out
    assert "past_key_values.*.key FLOAT [batch_size, 2, past_sequence_length, 16], 2 of them" in " ".join(said.split())
    card = (tmp_path / "out/README.md").read_text()
    assert "library_name: onnx" in card and "onnxruntime.InferenceSession" in card and str(made) not in card
    printed = io.StringIO()
    code = card.split("```python\n")[1].split("```")[0].replace("Once upon a time", "abc").replace("(40)", "(12)")
    with contextlib.chdir(tmp_path / "out"), contextlib.redirect_stdout(printed):
        exec(compile(code, "card", "exec"), {})
    ours = dougong("generate", made / "nano", "abc", "--tokens", 12, "--temperature", 0, "--json").json
    assert printed.getvalue().strip().endswith(("abc" + ours["generations"][0]["text"]).strip())
    changed = tmp_path / "out/model.onnx"
    changed.write_bytes(changed.read_bytes()[:-1] + b"?")
    outcome = dougong("inspect", tmp_path / "out", "--json")
    assert outcome.code == 1 or (outcome.code == 2 and "model.onnx is no whole ONNX file" in outcome.err)


def test_inspect_tells_what_each_kind_of_path_holds(made, tmp_path):
    pytest.importorskip("gguf")
    assert dougong("export", made / "qwen3", "--out", tmp_path / "hf", "--no-verify").code == 0
    gguf = dougong("export", made / "qwen3", "--out", tmp_path / "gguf", "--to", "gguf", "--quant", "q8_0",
                   "--no-verify")
    assert gguf.code == 0, gguf.err
    places = {"run": made / "qwen3", "checkpoint": made / "qwen3/checkpoints/step-000006",
              "Hugging Face model": tmp_path / "hf", "GGUF file": tmp_path / "gguf/qwen3-q8_0.gguf",
              "safetensors file": tmp_path / "hf/model.safetensors"}
    for kind, place in places.items():
        outcome = dougong("inspect", place, "--json")
        assert outcome.code == 0, outcome.err + outcome.out
        found = outcome.json
        assert found["kind"] == kind and found["facts"]["parameters"] == 28_896 and not found["problems"]
        assert sum(part["parameters"] for part in found["parts"]) == 28_896
        assert dougong("inspect", place).code == 0
    run = dougong("inspect", places["run"], "--json").json["facts"]
    assert run["family"] == "qwen3" and run["valid_checkpoints"] == run["checkpoints"]
    assert run["result"]["bits_per_byte"] > 0
    assert run["tokenizer"]["pre_tokenizer"] == "qwen2" and run["data"]["splits"]["train"]["documents"] == 53
    types = {part["part"]: part["dtype"] for part in dougong("inspect", places["GGUF file"], "--json").json["parts"]}
    assert types["blk.*.ffn_up.weight"] == "Q8_0" and types["blk.*.attn_norm.weight"] == "F32"
    parts = {part["part"]: part for part in dougong("inspect", places["Hugging Face model"], "--json").json["parts"]}
    assert parts["model.layers.*.mlp.up_proj.weight"]["shape"] == [64, 32]
    assert parts["model.layers.*.mlp.up_proj.weight"]["tensors"] == 2


def test_inspect_names_what_is_damaged(made, tmp_path):
    run = shutil.copytree(made / "qwen3", tmp_path / "run")
    with open(run / "checkpoints/step-000006/model.safetensors", "rb+") as file:
        file.seek(3000)
        file.write(b"\xff\xff\xff")
    for place in (run, run / "checkpoints/step-000006"):
        outcome = dougong("inspect", place, "--json")
        assert outcome.code == 1
        assert any("step-000006/model.safetensors: its checksum" in problem for problem in outcome.json["problems"])
    assert 6 not in dougong("inspect", run, "--json").json["facts"]["valid_checkpoints"]
    model = tmp_path / "hf"
    assert dougong("export", made / "qwen3", "--out", model, "--no-verify").code == 0
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-7])
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    outcome = dougong("inspect", model, "--json")
    assert outcome.code == 1 and len(outcome.json["problems"]) == 2
    assert "is cut off" in outcome.json["problems"][1] and "hidden_act" in outcome.json["problems"][0]
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00")
    outcome = dougong("inspect", tmp_path / "cut.gguf")
    assert outcome.code == 2 and "cut.gguf is no whole GGUF file" in outcome.err
    for place in (made / "texts", run / "checkpoints/step-000099"):
        outcome = dougong("inspect", place)
        assert outcome.code == 2 and "holds no run" in outcome.err
