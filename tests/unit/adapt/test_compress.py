"""`dougong compress`: what it writes is opened by every verb, computes what the integers stand for, and is checked."""

import json
import shlex

import pytest
import safetensors.torch
import torch
from tiny_recipe import MODELS, dougong, write_recipe, write_texts

from dougong.adapt.compression import FILE
from dougong.adapt.quantize import (
    Form,
    dequantised,
    integers_of,
    make_room,
    replace_part,
    round_to_nearest,
    take,
    with_integers,
)
from dougong.core.errors import CheckpointError, ConfigError
from dougong.generate import Engine, SamplingConfig, generate
from dougong.models.families.nano import NanoConfig
from dougong.nn.quantized import Quantized
from dougong.recipes.compress import form_for
from dougong.recipes.open_run import open_run

BPE = {"kind": "bpe", "vocab_size": 300}
FORMS = {"int8": Form(8), "int4": Form(4), "int8 activations": Form(8, None, "int8")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained Qwen3 with widths that groups of 32 divide."""
    place = tmp_path_factory.mktemp("compress")
    texts = write_texts(place / "texts")
    recipe = write_recipe(place / "tiny.yaml", texts, tokenizer=BPE, model={**MODELS["qwen3"], "dim": 64})
    assert dougong("train", recipe, "--run", place / "run").code == 0
    return place / "run"


@pytest.fixture(scope="module")
def int4(run):
    told = dougong("compress", run, "--to", "int4", "--json")
    assert told.code == 0, told.err
    assert told.json["run"] == str(run.with_name("run-int4")) and told.json["method"] == "rtn"
    assert 4.5 <= told.json["bits_per_weight"] < 5.5
    return run.with_name("run-int4")


@pytest.fixture(scope="module")
def int8(run):
    assert dougong("compress", run, "--to", "int8").code == 0
    return run.with_name("run-int8")


def _tokens(model, rows=3, length=20):
    return torch.randint(0, model.config.vocab_size, (rows, length))


def test_a_compressed_run_computes_what_rounding_its_source_gives(run, int4):
    source, opened = open_run(run), open_run(int4)
    take(source.model, round_to_nearest(source.model, bits=4), Form(4))
    tokens = _tokens(opened.model)
    assert torch.equal(opened.model(tokens), source.model(tokens))
    assert opened.compression.source["step"] == source.step and opened.compression.source["weights"] == source.weights
    assert opened.weights == source.weights == "ema"


def test_the_file_holds_plain_integers_and_names_what_stayed_float(int4):
    (place,) = (int4 / "checkpoints").iterdir()
    tensors = safetensors.torch.load_file(place / "model.safetensors")
    manifest = json.loads((place / FILE).read_text())
    assert manifest["format"] == 1
    for name, form in manifest["parts"].items():
        values, scale = tensors.pop(f"{name}.values"), tensors.pop(f"{name}.scale")
        assert (values.dtype, scale.dtype) == (torch.uint8, torch.float16)
        assert scale.shape[1] == -(-values.shape[1] * 2 // form["group"])
    assert sorted(tensors) == sorted(manifest["float"]) and all("norm" in name for name in tensors)


@pytest.mark.parametrize("damaged", ("model.safetensors", FILE))
def test_a_flipped_byte_is_found(int4, tmp_path, damaged):
    import shutil

    copied = shutil.copytree(int4, tmp_path / "copy")
    (place,) = (copied / "checkpoints").iterdir()
    content = bytearray((place / damaged).read_bytes())
    content[len(content) // 2] ^= 1
    (place / damaged).write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        open_run(copied)
    told = dougong("inspect", copied, "--json")
    assert told.code == 1 and any(damaged in problem for problem in told.json["problems"])


def test_every_verb_opens_it(int4):
    told = dougong("eval", int4, "--no-baselines", "--json")
    assert told.code == 0 and 0 < told.json["bits_per_byte"] < 8, told.err
    told = dougong("generate", int4, "ab", "--tokens", 4, "--json")
    assert told.code == 0 and told.json["generations"][0]["tokens"], told.err
    told = dougong("inspect", int4, "--json")
    assert told.code == 0 and told.json["facts"]["compressed"]["title"].startswith("int4, groups of 32 (rtn)")
    told = dougong("compress", int4, "--to", "int8", "--out", int4.with_name("twice"))
    assert told.code == 2 and "integers already" in told.err
    told = dougong("compress", int4, "--out", int4)
    assert told.code == 2 and "overwrites nothing" in told.err


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("changes", [{}, {"soft_cap": 5.0, "tied": False}, {"value_embeddings": "all"}],
                         ids=["tied", "untied, capped", "value embeddings"])
def test_greedy_text_is_that_of_the_dequantised_model(form, changes):
    # Weights far apart, so that bf16 rows in the kernel decide no token otherwise.
    model = _decoder(**changes)
    model.initialise(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    take(model, round_to_nearest(model, bits=form.bits, group=form.group), form)
    floats = model if form.activations == "int8" else dequantised(model)   # activations are rounded in both
    sampling = SamplingConfig(temperature=0, max_tokens=12)
    prompts = [[1, 2, 3], [4, 5], [6]]
    written: dict[int, list[int]] = {i: [] for i in range(3)}
    for step in Engine(model.eval()).start(prompts, sampling):
        for token in step:
            written[token.row].append(token.id)
    for row, prompt in enumerate(prompts):
        for token in written[row]:     # each token is the reference's best, or so near that bf16 cannot tell
            logits = floats(torch.tensor([prompt]))[0, -1]
            spread = (logits.max() - logits.min()).item()
            assert logits.max() - logits[token] <= 0.02 * spread
            prompt = [*prompt, token]


def _decoder(**changes):
    from dougong.models.compose import DecoderConfig
    from dougong.nn.attention import AttentionConfig
    from dougong.nn.feed_forward import SwiGLUConfig

    return DecoderConfig(vocab_size=96, context=64, dim=64, num_layers=2, attention=AttentionConfig(num_heads=2),
                         feed_forward=SwiGLUConfig(ffn_dim=128), **changes).build()


def test_a_batch_writes_what_its_rows_write_alone(int8):
    opened = open_run(int8)
    sampling = SamplingConfig(temperature=0, max_tokens=8)
    together = generate(opened.model, opened.tokenizer, ["ab", "cde fg"], sampling, runtime=opened.runtime)
    alone = [generate(opened.model, opened.tokenizer, [prompt], sampling, runtime=opened.runtime)[0]
             for prompt in ("ab", "cde fg")]
    assert [one.text for one in together] == [one.text for one in alone]


@pytest.mark.parametrize(("which", "quant"), [("int8", "q8_0"), ("int4", "q4_0")])
def test_gguf_holds_the_runs_own_integers(which, quant, request, tmp_path):
    gguf = pytest.importorskip("gguf")
    path = request.getfixturevalue(which)
    told = dougong("export", path, "--to", "gguf", "--out", tmp_path / "out", "--json")
    assert told.code == 0, told.err
    assert told.json["dtype"] == quant and "own" in told.json["notes"][0]
    (file,) = (tmp_path / "out").glob("*.gguf")
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(str(file)).tensors}
    parts = integers_of(open_run(path).model)
    for theirs, ours in (("token_embd.weight", "stem.tokens.weight"), ("blk.1.ffn_down.weight",
                                                                       "stack.1.feed_forward.down.weight")):
        tensor, part = held[theirs], parts[ours]
        assert tensor.tensor_type.name.lower() == quant
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(found, part.weight)


def test_hugging_face_gets_floats_and_is_told_so(int4, tmp_path):
    pytest.importorskip("transformers")
    told = dougong("export", int4, "--to", "hf", "--out", tmp_path / "hf", "--json")
    assert told.code == 0, told.err
    assert "floats that they stand for" in told.json["notes"][0]
    held = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(held[name], open_run(int4).model.get_submodule("stack.0.feed_forward.down").weight)


def test_integers_of_any_method_are_taken_and_exported_as_they_are(run, tmp_path):
    # Groups whose largest integer is not the largest there is: rounding them anew would change them.
    opened = open_run(run)
    part = opened.model.get_submodule("stack.0.feed_forward.down")
    integers = torch.randint(-3, 4, part.weight.shape, dtype=torch.int8)
    scale = torch.rand(part.weight.shape[0], part.weight.shape[1] // 32).half()
    replace_part(opened.model, "stack.0.feed_forward.down", with_integers(part, Form(4), integers, scale))
    from dougong.interop.gguf_file import _blocks
    from dougong.interop.gguf_form import gguf_form
    from dougong.interop.published import published_form

    gguf = pytest.importorskip("gguf")
    family, config = published_form(opened.recipe.model)
    blocks = _blocks(gguf_form(family, config), integers_of(opened.model), "q4_0")["blk.0.ffn_down.weight"]
    found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)
    expected = integers.float() * scale.float().repeat_interleave(32, 1)
    assert torch.equal(torch.from_numpy(found), expected)


def test_text_is_refused_where_nothing_would_look_at_it(run, tmp_path):
    told = dougong("compress", run, "--to", "int4", "--data", run.with_name("texts"), "--out", tmp_path / "out")
    assert told.code == 2 and "rtn" in told.err and "--method gptq" in told.err and not (tmp_path / "out").exists()


def test_printed_commands_can_be_copied_whatever_the_folder_is_called(run, tmp_path):
    place = tmp_path / "my runs" / "four bits"
    told = dougong("compress", run, "--to", "int4", "--out", place)
    assert told.code == 0, told.err
    command = told.out.split("what it costs: ")[1].split(", or beside")[0]
    assert shlex.split(command) == ["dougong", "eval", str(place)]


def test_a_form_of_the_future_is_refused_by_its_number(int4, tmp_path):
    from dougong.adapt.compression import read_compression

    (place,) = (int4 / "checkpoints").iterdir()
    (tmp_path / FILE).write_text(json.dumps({**json.loads((place / FILE).read_text()), "format": 2}))
    with pytest.raises(CheckpointError, match="format 2"):
        read_compression(tmp_path)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="does not say"):
        read_compression(tmp_path)


def test_a_manifest_for_another_model_is_refused():
    model = NanoConfig(vocab_size=8, context=8, dim=32, num_layers=1, num_heads=1, ffn_dim=32).build()
    with pytest.raises(CheckpointError, match="no such matrix"):
        make_room(model, {"stack.9.attention.query": Form(4)})


def test_forms_that_no_kernel_could_mean_are_refused():
    assert form_for("int8", group=None, activations="int8") == Form(8, None, "int8")
    assert form_for("int4", group=0, activations="float") == Form(4, None)
    with pytest.raises(ConfigError, match="int3"):
        form_for("int3", group=None, activations="float")
    with pytest.raises(ConfigError, match="activations=int8"):
        Quantized(4, 4, 4, None, "int8")
