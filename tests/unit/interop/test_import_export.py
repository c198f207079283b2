"""Import and export of Hugging Face directories: bit-identical there and back, refused where they cannot be trusted."""

import json
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_recipe import dougong

from dougong.core.config import replace
from dougong.core.errors import CheckpointError, ConfigError, DougongError, MissingExtraError
from dougong.interop import export_hf as export_module
from dougong.interop.export_hf import rounded
from dougong.interop.hub import local_directory
from dougong.interop.import_hf import read_hf
from dougong.interop.published import published_form
from dougong.interop.tensor_files import headers, read_tensors, write_shards
from dougong.interop.verify import Mismatch, compare_logits
from dougong.models.compose import DecoderConfig
from dougong.models.families.nano import NanoConfig
from dougong.recipes.derive import resolve
from dougong.recipes.export import _without_place, export_hf, published_whole
from dougong.recipes.import_model import import_run
from dougong.recipes.open_run import open_run
from dougong.recipes.recipe import StartConfig, load_recipe
from dougong.recipes.start import read_weights

transformers = pytest.importorskip("transformers")
import tiny_hf  # noqa: E402

KINDS = tuple(tiny_hf.SHAPES)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_hf.write(folder / kind, kind) for kind in KINDS}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Two threads on a shared machine mostly wait for each other."""
    monkeypatch.setattr("dougong.recipes.open_run.usable_cores", lambda: 1)


@pytest.fixture
def qwen3(models, tmp_path):
    """A copy to damage."""
    return shutil.copytree(models["qwen3"], tmp_path / "qwen3")


def tensors(directory):
    return dict(read_tensors(directory))


@pytest.mark.parametrize("kind", KINDS)
def test_import_export_import_is_bit_identical_and_verified(models, kind, tmp_path):
    first = read_hf(models[kind])
    run = import_run(first, tmp_path / "run", source="here").directory.path
    exported = export_hf(open_run(run), tmp_path / "out")
    assert exported.verified and exported.verified.reader == "transformers" and exported.verified.tokens > 100
    again = read_hf(tmp_path / "out")
    assert again.config == first.config and again.dtype == first.dtype
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert again.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in first.tensors.items())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_bf16_in_shards_leaves_as_it_came(kind, tmp_path):
    directory = tiny_hf.write(tmp_path / "model", kind, dtype=torch.bfloat16, shard="60KB")
    assert len(headers(directory)) > 1
    read = read_hf(directory)
    assert read.dtype == "bfloat16" and "widened to float32" in read.notes[0]
    run = import_run(read, tmp_path / "run", source="here").directory.path
    exported = export_hf(open_run(run), tmp_path / "out", shard_bytes=60_000)
    assert exported.dtype == "bf16" and len([name for name in exported.files if "-of-" in name]) > 1
    theirs, ours = tensors(directory), tensors(tmp_path / "out")
    assert theirs.keys() == ours.keys()
    assert all(ours[n].dtype == torch.bfloat16 and torch.equal(ours[n], theirs[n]) for n in theirs)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16


def test_config_has_the_keys_of_both_generations(models, tmp_path):
    opened = open_run(models["llama"])
    exported = export_hf(opened, tmp_path / "out", dtype="bf16", verify=False, license="apache-2.0")
    assert exported.verified is None
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    end = tiny_hf.tokenizer().document_id
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert config["eos_token_id"] == end == generation["eos_token_id"]
    assert "license: apache-2.0" in (tmp_path / "out/README.md").read_text()


def test_a_chat_template_travels_in_both_forms_and_renders_alike(qwen3, tmp_path):
    settings = json.loads((qwen3 / "tokenizer_config.json").read_text())
    (qwen3 / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": tiny_hf.TEMPLATE}))
    export_hf(open_run(qwen3), tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_text() == tiny_hf.TEMPLATE
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"] == tiny_hf.TEMPLATE
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<user>x"


def test_of_several_chat_templates_the_default_one_leaves(qwen3, tmp_path):
    settings = json.loads((qwen3 / "tokenizer_config.json").read_text())
    several = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": tiny_hf.TEMPLATE}]
    (qwen3 / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": several}))
    opened = open_run(qwen3)
    assert opened.tokenizer.chat_template == tiny_hf.TEMPLATE
    export_hf(opened, tmp_path / "out")
    assert (tmp_path / "out/chat_template.jinja").read_text() == tiny_hf.TEMPLATE
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"] == tiny_hf.TEMPLATE


def test_the_card_of_an_imported_model_names_no_folder(models, tmp_path):
    run = import_run(read_hf(models["llama"]), tmp_path / "run", source=str(models["llama"])).directory.path
    export_hf(open_run(run), tmp_path / "out", verify=False)
    card = (tmp_path / "out/README.md").read_text()
    assert "imported from `llama`" in card and str(models["llama"].parent) not in card


@pytest.mark.parametrize(("given", "told"), [
    ("/home/ann/runs/big", "big"), ("hf:org/name@main", "hf:org/name@main"), ("ms:org/name", "ms:org/name"),
    ("model:/home/ann/judge", "model:judge"), ("/home/ann/rewards.py:f", "rewards.py:f"), ("exact", "exact"),
    ("regex:a/b", "regex:a/b")])
def test_what_a_card_tells_of_models_and_rewards_names_no_folder(given, told):
    assert _without_place(given) == told


def test_two_exports_to_one_place_do_not_disturb_each_other(tmp_path):
    out = tmp_path / "out"

    def quicker(place):
        (place / "mine").write_text("a")
        published_whole(out, lambda other: (other / "theirs").write_text("b"))

    with pytest.raises(ConfigError, match="exists already"):
        published_whole(out, quicker)
    assert [path.name for path in out.iterdir()] == ["theirs"] and [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "plain").mkdir()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode


# -- a wrong export does not survive --------------------------------------------------------------------------------

def _swap(state, a, b):
    return {**state, a: state[b], b: state[a]}


@pytest.mark.parametrize(("what", "wrong"), {
    # what leaves the last layer is seen after the final norm
    "the final norm": lambda s: {**s, "norm.weight": s["norm.weight"].index_fill(0, torch.tensor([3]), 1.5)},
    "layer 0": lambda s: _swap(s, "stack.0.attention.output.weight", "stack.1.attention.output.weight"),
}.items())
def test_wrong_weights_are_found_named_by_layer_and_removed(models, tmp_path, monkeypatch, what, wrong):
    monkeypatch.setattr("dougong.recipes.export.write_hf", _writing(wrong))
    with pytest.raises(Mismatch, match=f"row 0, position 0.*First to differ: {what}"):
        export_hf(open_run(models["llama"]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _writing(wrong):
    real = export_module.write_hf

    def write(directory, family, config, state, tokenizer, **more):
        return real(directory, family, config, wrong(dict(state)), tokenizer, **more)

    return write


@pytest.mark.parametrize(("key", "value", "message"), [
    ("rms_norm_eps", 1e-3, "computes something else"), ("rope_theta", 20_000.0, "computes something else")])
def test_a_wrong_constant_is_found(models, tmp_path, monkeypatch, key, value, message):
    from dougong.interop.maps import MAPS

    real = MAPS["qwen3"].config_to_hf

    def wrong(config):
        found = real(config) | {key: value}
        if key == "rope_theta":
            found["rope_parameters"] = {"rope_type": "default", "rope_theta": value}
        return found

    object.__setattr__(MAPS["qwen3"], "config_to_hf", wrong)
    try:
        with pytest.raises(Mismatch, match=message):
            export_hf(open_run(models["qwen3"]), tmp_path / "out")
    finally:
        object.__setattr__(MAPS["qwen3"], "config_to_hf", real)
    assert not (tmp_path / "out").exists()


def beside(model, wrong):
    """Compares a model with itself, of whose logits `wrong` changes the first row's."""
    calls = []

    def reader(tokens):
        calls.append(0)
        logits = model(tokens).detach()
        return wrong(logits) if len(calls) == 1 else logits

    rows = torch.randint(300, (6, 20), generator=torch.Generator().manual_seed(0)).tolist()
    return compare_logits(model, reader, rows, "another", texts=6)


@pytest.mark.parametrize(("wrong", "message"), [
    (lambda logits: logits * torch.nan, "another gives logits that are no numbers .* in row 0"),
    (lambda logits: logits.index_fill(1, torch.tensor([3]), torch.inf), "no numbers"),
    (lambda logits: logits.flip(-1), "computes something else"),
    (lambda logits: logits + 0.2 * logits.abs().max(), "row 0, position 0: logits differ by 2.0e-01")])
def test_experts_excuse_no_garbage_in_any_row(models, wrong, message):
    with pytest.raises(Mismatch, match=message):
        beside(open_run(models["qwen3_moe"]).model, wrong)


def test_a_tipped_choice_of_experts_is_told(models):
    found = beside(open_run(models["qwen3_moe"]).model, lambda logits: logits + 0.01 * logits.abs().max())
    assert found.tipped == 1 and found.tipped_difference == pytest.approx(0.01, rel=1e-3)
    assert found.largest_difference <= found.allowed < 1e-4
    assert "rounding tips the choice of experts: 1, which differ by up to 1.0e-02" in found.sentence()
    with pytest.raises(Mismatch, match="computes something else"):
        beside(open_run(models["qwen3"]).model, lambda logits: logits + 0.01 * logits.abs().max())


def test_another_tokenizer_is_found_at_its_first_token(models, tmp_path, monkeypatch):
    real = export_module._write_tokenizer
    monkeypatch.setattr(export_module, "_write_tokenizer",
                        lambda place, _tokenizer, config: real(place, tiny_hf.tokenizer("gpt-2"), config))
    with pytest.raises(Mismatch, match=r"reads .* as other tokens: at position"):
        export_hf(open_run(models["qwen3"]), tmp_path / "out")


def test_a_wrong_end_token_is_found(models, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "special_ids", lambda _tokenizer: {"eos_token_id": 7})
    with pytest.raises(Mismatch, match=r"generation_config is token 7 .* end with 292"):
        export_hf(open_run(models["qwen3"]), tmp_path / "out")


def test_without_transformers_the_extra_is_named(models, tmp_path, monkeypatch):
    import sys

    opened = open_run(models["qwen3"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"dougong\[hf\]"):
        export_hf(opened, tmp_path / "out")
    assert export_hf(opened, tmp_path / "out", verify=False).files["config.json"]


def test_an_export_overwrites_nothing(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="overwrites nothing"):
        export_hf(open_run(models["qwen3"]), tmp_path / "out", verify=False)
    assert (tmp_path / "out/mine.txt").read_text() == "mine"


# -- what a format cannot hold --------------------------------------------------------------------------------

SIZES = {"vocab_size": 300, "context": 64, "dim": 64, "num_layers": 2}


def test_what_no_published_family_has_is_named():
    config = NanoConfig(**SIZES, num_heads=4, soft_cap=15.0, value_embeddings="all", position="rope_alibi", window=8,
                        window_pattern="SL")
    with pytest.raises(ConfigError) as refused:
        published_form(config)
    for word in ("soft_cap=15.0", "value_embeddings=all", "residual=x0", "position=rope_alibi", "window_pattern=SL",
                 "qk_norm=plain", "relu2", "without parameters", "model.kind=qwen3"):
        assert word in str(refused.value), word


@pytest.mark.parametrize("kind", KINDS)
def test_an_open_decoder_that_equals_a_family_leaves_as_it(models, kind):
    config = read_hf(models[kind]).config
    if kind == "qwen3_moe":
        with pytest.raises(ConfigError, match="feed_forward=moe"):
            published_form(config.decoder())
        return
    family, found = published_form(config.decoder())
    assert found.kind == kind and family.architecture.lower().startswith(kind)
    assert family.config_to_hf(found)["model_type"] == kind


def test_a_decoder_that_equals_none_says_in_what():
    attention = {"num_heads": 4, "qk_norm": "learned", "qk_norm_eps": 1e-3}
    with pytest.raises(ConfigError, match=r"qk_norm_eps=0.001 \(qwen3 has 1e-06\)"):
        published_form(DecoderConfig(**SIZES, attention=attention))


def test_half_precision_that_would_overflow_is_refused():
    with pytest.raises(ConfigError, match=r"big.weight holds 1e\+05, beyond the range of f16.*bf16"):
        rounded({"big.weight": torch.tensor([1e5])}, "f16")
    with pytest.raises(CheckpointError, match="no numbers"):
        rounded({"big.weight": torch.tensor([float("nan")])}, "f32")


# -- directories that cannot be trusted --------------------------------------------------------------------------------

def test_truncated_weights_name_file_and_key(qwen3):
    path = qwen3 / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors is cut off: model\.\S+ ends at byte"):
        read_hf(qwen3)


@pytest.mark.parametrize("size", [0, 5, 300])
def test_a_file_cut_in_its_header_is_refused(qwen3, size):
    path = qwen3 / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model.safetensors is no safetensors file, or was cut off"):
        read_hf(qwen3)


def rewrite_header(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])


@pytest.mark.parametrize(("entry", "message"), [
    ({"shape": [7, 7]}, "needs 196 bytes"), ({"data_offsets": [0, 10**12]}, "needs"), ({"dtype": "F8_E5M2"}, "F8_E5M2"),
    ({"data_offsets": "no"}, "is damaged"), ({"shape": [-64]}, "is damaged")])
def test_a_tampered_header_names_file_and_key(qwen3, entry, message):
    rewrite_header(qwen3 / "model.safetensors", lambda header: header["model.norm.weight"].update(entry))
    with pytest.raises(CheckpointError, match=message) as refused:
        read_hf(qwen3)
    assert "model.safetensors" in str(refused.value) and "model.norm.weight" in str(refused.value)


def test_values_that_are_no_numbers_name_file_and_key(qwen3):
    held = load_file(qwen3 / "model.safetensors")
    held["model.norm.weight"][5] = float("nan")
    save_file(held, qwen3 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.safetensors: model.norm.weight holds values that are no num"):
        read_hf(qwen3)


def test_an_index_that_points_elsewhere_is_refused(tmp_path):
    directory = tiny_hf.write(tmp_path / "model", "qwen3", shard="60KB")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    held = next(iter(index["weight_map"]))
    for place, message in (("../../etc/x.safetensors", "no safetensors file of this directory"),
                           ("model.bin", "no safetensors file of this directory"),
                           ("model-00009-of-00009.safetensors", "cannot be read")):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | {held: place}}))
        with pytest.raises(CheckpointError, match=message):
            read_hf(directory)


@pytest.mark.parametrize("index", [{"weight_map": ["a"]}, {"weight_map": 5}, []])
def test_an_index_without_a_map_is_refused(tmp_path, index):
    directory = tiny_hf.write(tmp_path / "model", "qwen3", shard="60KB")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        read_hf(directory)


@pytest.mark.parametrize("end", [-5, True, 2**40])
def test_a_token_that_cannot_be_ends_nothing(qwen3, end):
    settings = json.loads((qwen3 / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (qwen3 / "tokenizer_config.json").write_text(json.dumps(settings))
    (qwen3 / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    assert read_hf(qwen3).tokenizer.document_id is None


@pytest.fixture
def joined(models, tmp_path):
    """A mixture of experts as transformers 5 holds it in memory, and what changes its tensors."""
    directory = shutil.copytree(models["qwen3_moe"], tmp_path / "joined")

    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    held = {name: tensor for name, tensor in tensors(directory).items() if ".experts." not in name}
    held |= {name: tensor for name, tensor in theirs.items() if ".experts." in name}

    def write(change):
        save_file(change(held), directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return write


def test_joined_experts_are_read_and_held_against_the_config(models, joined):
    found, published = read_hf(joined(lambda held: held)).tensors, read_hf(models["qwen3_moe"]).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in published.items())
    first = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(CheckpointError, match=r"experts.down is of shape \[4, 64, 16\], .* asks for \[4, 64, 32\]"):
        read_hf(joined(lambda held: held | {name: tensor[:, :, :16].contiguous() for name, tensor in held.items()
                                            if name.endswith("experts.down_proj")}))
    for wrong in ({first: torch.ones(4, 8)}, {"odd": torch.ones(3)}):
        with pytest.raises(CheckpointError, match="left over"):
            read_hf(joined(lambda held, wrong=wrong: held | wrong))


def test_pickled_weights_are_refused_with_the_reason(qwen3):
    (qwen3 / "model.safetensors").rename(qwen3 / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*loading a pickle runs"):
        read_hf(qwen3)


def test_a_tokenizer_larger_than_the_embedding_names_both(qwen3):
    tiny_hf.tokenizer(vocab_size=310).save(qwen3)
    with pytest.raises(ConfigError, match=r"310 tokens.* only 300 rows"):
        read_hf(qwen3)


def test_weights_of_another_shape_are_refused(qwen3):
    config = json.loads((qwen3 / "config.json").read_text())
    (qwen3 / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))
    with pytest.raises(CheckpointError, match=r"model.safetensors: \S+_proj.weight has shape"):
        read_hf(qwen3)


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "qwen4"}, r"model_type='qwen4'.*Known: gpt2, llama, qwen3.*Nearest: 'qwen3'"),
    ({"model_type": "mamba"}, "Known: gpt2, llama"), (
    {"quantization_config": {"quant_method": "awq"}}, "quantised .awq"),
    ({"hidden_act": "relu"}, "hidden_act='relu'"), ({"hidden_size": "wide"}, "wrong type"),
    ({"architectures": 5}, "wrong type"), ({"model_type": ["qwen3"]}, "wrong type"),
    ({"quantization_config": "int8"}, "wrong type"),
    ({"model_type": "llama", "head_dim": None, "num_attention_heads": 0}, "wrong type or size: .*zero"),
    ({"hidden_size": 10**20}, "config.json asks for"), ({"vocab_size": 1 << 62}, "asks for what no tensor can hold"),
    ({"num_hidden_layers": 10**9}, "asks for 1,000,000,000 layers, and the files hold")])
def test_what_is_not_known_is_named(qwen3, changes, message):
    config = json.loads((qwen3 / "config.json").read_text())
    (qwen3 / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(DougongError, match=message):
        read_hf(qwen3)


def test_a_model_that_begins_otherwise_than_it_ends_keeps_both(qwen3, tmp_path):
    settings = json.loads((qwen3 / "tokenizer_config.json").read_text())
    (qwen3 / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<|reserved_0|>"}))
    opened = open_run(qwen3)
    assert (opened.tokenizer.begin_id, opened.tokenizer.document_id) == (293, 292)
    export_hf(opened, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (293, 292)
    assert read_hf(tmp_path / "out").tokenizer.begin_id == 293
    theirs = transformers.AutoModelForCausalLM.from_pretrained(qwen3)
    ids = [293, *opened.tokenizer.encode("The quick").tolist()]
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids):].tolist()
    from dougong.generate import SamplingConfig

    found = opened.generate(["The quick"], SamplingConfig(max_tokens=6, temperature=0.0))[0]
    assert found.tokens == expected


def test_hub_names_and_places(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="hf:owner/model or ms:owner/model"):
        local_directory("owner/model")
    with pytest.raises(ConfigError, match="no model's name"):
        local_directory("hf:model")
    import huggingface_hub

    def offline(*_args, **_more):
        raise OSError("no route to the host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="could not be fetched from Hugging Face: no route"):
        local_directory("hf:owner/model@main")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_more: str(tmp_path))
    assert local_directory("hf:owner/model") == tmp_path
    with pytest.raises(MissingExtraError, match="modelscope"):
        local_directory("ms:owner/model")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(qwen3, tmp_path, monkeypatch):
    """A hub with one model, as its client keeps it; what was asked of it: (revision, files)."""
    import huggingface_hub

    kept, asked = tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT, []

    def snapshot_download(name, *, revision, allow_patterns):
        assert name == "org/tiny"
        asked.append((revision, set()))
        for file in qwen3.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                kept.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, kept / file.name)
                asked[-1][1].add(file.name)
        return str(kept)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(theirs=qwen3, kept=kept, asked=asked)


def test_looking_at_a_model_of_the_hub_fetches_no_weights(hub):
    for arguments in (["show", "sft", "--model", "hf:org/tiny"],
                      ["plan", "first", "--model", "hf:org/tiny", "train.steps=9", "--no-probe"]):
        done = dougong(*arguments)
        assert done.code == 0, done.err
    assert hub.asked and all(files >= {"config.json", "tokenizer.json"} for _, files in hub.asked)
    assert not list(hub.kept.glob("*.safetensors"))


def test_weights_are_of_the_revision_whose_config_was_read(hub):
    recipe, _ = load_recipe("sft", ["start.path=hf:org/tiny", "model.dropout=0.25"])
    assert recipe.start.path == f"hf:org/tiny@{COMMIT}"
    assert recipe.model.dropout == 0.25 and recipe.tokenizer.path == str(hub.kept)
    bare = replace(recipe, start=StartConfig(path="hf:org/tiny"), model=None, tokenizer=None)
    assert resolve(bare)[0].start.path == recipe.start.path
    hub.asked.clear()
    assert read_weights(recipe.start).tensors
    assert {revision for revision, _ in hub.asked} == {COMMIT} and list(hub.kept.glob("*.safetensors"))
    hub.asked.clear()
    open_run("hf:org/tiny")
    assert [revision for revision, _ in hub.asked] == [None, COMMIT]


@pytest.mark.parametrize(("changes", "says"), [
    ({"model_type": "qwen2"}, "model_type='qwen2'"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type")])
def test_what_is_not_read_is_refused_before_its_weights_are_fetched(hub, changes, says):
    config = json.loads((hub.theirs / "config.json").read_text())
    (hub.theirs / "config.json").write_text(json.dumps(config | changes))
    for arguments in (["generate", "hf:org/tiny", "a"], ["import", "hf:org/tiny"], ["show", "sft", "--model",
                                                                                     "hf:org/tiny"]):
        refused = dougong(*arguments)
        assert refused.code == 2 and says in refused.err
        assert "Qwen3-MoE, such as hf:Qwen/Qwen3-0.6B" in refused.err
    assert not list(hub.kept.glob("*.safetensors"))


def test_a_model_of_the_hub_leaves_under_its_name_into_the_folder_one_is_in(models, tmp_path, monkeypatch):
    import huggingface_hub

    kept = shutil.copytree(models["llama"], tmp_path / "hub/models--org--Tiny-0.1B/snapshots/0a1b2c")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_more: str(kept))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for command in (["export", "hf:org/Tiny-0.1B@main", "--no-verify"], ["compress", "hf:org/Tiny-0.1B"]):
        done = dougong(*command)
        assert done.code == 0, done.err
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["Tiny-0.1B-hf", "Tiny-0.1B-int8"]
    assert "# Tiny-0.1B\n" in (tmp_path / "here/Tiny-0.1B-hf/README.md").read_text()
    assert [path.name for path in kept.parent.iterdir()] == ["0a1b2c"]


def test_a_shard_holds_what_fits_and_the_index_says_where(tmp_path):
    held = {f"t{i}": torch.arange(10.0) + i for i in range(5)}
    names = write_shards(tmp_path, held, shard_bytes=100)
    assert len(names) == 3 and [len(load_file(tmp_path / name)) for name in names] == [2, 2, 1]
    again = dict(read_tensors(tmp_path))
    assert all(torch.equal(again[name], tensor) for name, tensor in held.items())


# -- the verbs --------------------------------------------------------------------------------

def test_every_verb_opens_an_imported_run_and_a_directory(models, tmp_path, monkeypatch):
    monkeypatch.setenv("DOUGONG_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    for i in range(60):
        (tmp_path / f"texts/{i}.txt").write_text(f"{i} {tiny_hf.TEXT}" * (3 + i % 5), encoding="utf-8")
    made = dougong("import", models["llama"], "--run", tmp_path / "run", "--data", tmp_path / "texts", "--json")
    assert made.code == 0 and made.json["family"] == "llama", made.err
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    texts = [dougong("generate", place, "The", "--tokens", 6, "--json").json["generations"][0]["tokens"]
             for place in (moved, models["llama"])]
    assert texts[0] == texts[1]
    scores = [dougong("eval", moved, "--no-baselines", "--json"),
              dougong("eval", models["llama"], "--no-baselines", "--data", tmp_path / "texts", "--json")]
    assert scores[0].json["bits_per_byte"] == scores[1].json["bits_per_byte"], scores[0].err
    without = dougong("eval", models["llama"])
    assert without.code == 2 and "--data" in without.err
    assert dougong("report", moved).code == 0
    exported = dougong("export", moved, "--json")
    assert exported.code == 0 and exported.json["verified"]["texts"] > 10
    ours, theirs = tensors(tmp_path / "elsewhere-hf"), tensors(models["llama"])
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
