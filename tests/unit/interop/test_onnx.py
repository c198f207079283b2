"""ONNX directories: read by onnxruntime whole, through the cache and padded, and damaged ones found and named."""

import json
import shutil
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch

from dougong.core.config import from_dict
from dougong.core.errors import CheckpointError, ConfigError
from dougong.data.tokenizer import BytesConfig
from dougong.interop.export_onnx import Session, verify_onnx, write_onnx_directory
from dougong.interop.inspect import inspect_path
from dougong.interop.model_card import CardFacts, model_card
from dougong.interop.onnx_graph import cache_names, write_onnx
from dougong.interop.verify import Mismatch
from dougong.models import FAMILIES

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
sys.path.append(str(Path(__file__).parents[2] / "contract"))
from test_models import LANGUAGE_MODELS, model_of, tokens_of  # noqa: E402

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 3, "def add(a, b):\n    return a + b\n"]
SMALL = {"vocab_size": 257, "context": 48, "dim": 32, "num_layers": 1, "num_heads": 4}


def model(kind="qwen3", **changes):
    """Random weights, large enough that every norm and bias matters."""
    made = from_dict(FAMILIES[kind], SMALL | changes).build()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else 1 + 0.2 * noise)
    return made.eval()


def written(directory, made, **more):
    directory.mkdir()
    write_onnx_directory(directory, made, BytesConfig().build(), about={"dougong.family": made.config.kind}, **more)
    return directory


def verified(directory, made, dtype="f32"):
    return verify_onnx(directory, made, BytesConfig().build(), TEXTS, dtype=dtype)


@pytest.fixture(scope="module", autouse=True)
def no_shape_checks():
    """Lengths are symbols while a model is traced, and the checks of every test know numbers only."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    made = model(num_kv_heads=2, window=6, full_layers=0)
    return made, written(tmp_path_factory.mktemp("onnx") / "qwen3", made)


@pytest.fixture
def copy(qwen3, tmp_path):
    """A copy to damage."""
    return shutil.copytree(qwen3[1], tmp_path / "copy")


def edited(directory, change):
    graph = onnx.load(str(directory / "model.onnx"))
    change(graph)
    onnx.save(graph, str(directory / "model.onnx"))
    return directory


def initializer(graph, name):
    return next(tensor for tensor in graph.graph.initializer if tensor.name == name)


def test_onnxruntime_reads_it_whole_through_the_cache_and_padded(qwen3):
    found = verified(qwen3[1], qwen3[0])
    assert found.tokens > 300 and found.texts > 10 and "onnxruntime" in found.reader
    assert found.largest_difference <= found.allowed < 1e-4


def test_inputs_and_outputs_have_the_names_and_axes_that_readers_of_hugging_face_expect(qwen3):
    graph = onnx.load(str(qwen3[1] / "model.onnx"))
    onnx.checker.check_model(graph, full_check=True)

    def told(values):
        return {value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
                for value in values}

    assert told(graph.graph.input) == {
        "input_ids": ["batch_size", "sequence_length"], "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
        "past_key_values.0.key": ["batch_size", 2, "past_sequence_length", 8],
        "past_key_values.0.value": ["batch_size", 2, "past_sequence_length", 8]}
    assert list(told(graph.graph.output)) == ["logits", "present.0.key", "present.0.value"]
    assert {one.domain for one in graph.opset_import} == {""} and graph.opset_import[0].version == 18
    config = json.loads((qwen3[1] / "config.json").read_text())
    assert config["model_type"] == "qwen3" and config["num_key_value_heads"] == 2 and config["head_dim"] == 8


def test_the_file_names_nobody_and_holds_the_weights_once_under_their_names(qwen3):
    made, directory = qwen3
    data = (directory / "model.onnx").read_bytes()
    assert b".py" not in data and b"File " not in data and b"dougong/" not in data
    graph = onnx.load(str(directory / "model.onnx"))
    held = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
            for tensor in graph.graph.initializer}
    state = made.state_dict()
    assert held.keys() == state.keys() and all(torch.equal(held[name], state[name]) for name in state)


def test_tokens_that_the_mask_hides_change_nothing_wherever_they_stand(qwen3):
    made, directory = qwen3
    session = Session(directory / "model.onnx", cache_names(made))
    tokens = torch.tensor([[5, 6, 7, 200, 201, 8]])
    mask, position = torch.tensor([[1, 1, 1, 0, 0, 1]]), torch.tensor([[0, 1, 2, 2, 2, 3]])
    feed = {"input_ids": tokens.numpy(), "attention_mask": mask.numpy(), "position_ids": position.numpy(),
            **{name: torch.zeros(1, 2, 0, 8).numpy() for name in cache_names(made)}}
    logits = torch.from_numpy(session._session.run(["logits"], feed)[0])
    feed["input_ids"] = torch.tensor([[5, 6, 7, 9, 9, 8]]).numpy()
    other = torch.from_numpy(session._session.run(["logits"], feed)[0])
    torch.testing.assert_close(logits[mask.bool()], other[mask.bool()], rtol=0, atol=0)
    # the window of 6 reaches back to all of them, so the last token is read as the fourth
    torch.testing.assert_close(logits[:, -1], made(torch.tensor([[5, 6, 7, 8]]))[:, -1], rtol=0, atol=1e-4)


def _scaled(graph):
    tensor = initializer(graph, "stack.0.attention.value.weight")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.01, tensor.name))


def _without_the_past(graph):
    """The cache's values of before are forgotten, which a whole text does not show."""
    node = next(node for node in graph.graph.node
                if node.op_type == "Concat" and "past_key_values.0.value" in node.input)
    node.input[0] = node.input[1]
    del node.input[1]


def _blind_to_the_mask(graph):
    """Padding is read; only a padded batch shows it."""
    node = next(node for node in graph.graph.node if node.op_type == "Equal")
    node.input[0] = node.input[1]


@pytest.mark.parametrize(("change", "message"), [
    (_scaled, r"onnxruntime \(whole texts\) computes something else.*\n.*row 0, position \d"),
    (_without_the_past, r"onnxruntime \(through the cache\)|onnxruntime cannot read"),
    (_blind_to_the_mask, r"onnxruntime \(a left-padded batch\)")])
def test_a_graph_that_computes_something_else_is_found_and_named_by_the_reading(qwen3, copy, change, message):
    with pytest.raises(Mismatch, match=message):
        verified(edited(copy, change), qwen3[0])


def test_another_end_of_texts_and_other_tokens_are_found(qwen3, copy):
    path = copy / "generation_config.json"
    path.write_text(path.read_text().replace("256", "255"))
    with pytest.raises(Mismatch, match=r"generation_config.json names other tokens"):
        verified(copy, qwen3[0])
    path = copy / "tokenizer.json"
    spec = json.loads(path.read_text())
    words = spec["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(spec))
    with pytest.raises(Mismatch, match=r"tokenizers reads .* as other tokens"):
        verified(copy, qwen3[0])


def test_inspect_tells_what_it_holds_and_names_what_was_changed(qwen3, copy):
    found = inspect_path(qwen3[1])
    assert found["kind"] == "ONNX model" and not found["problems"]
    assert found["facts"]["parameters"] == sum(p.numel() for p in qwen3[0].parameters())
    assert found["facts"]["family"] == "qwen3" and found["facts"]["opset"] == 18
    assert found["facts"]["inputs"]["input_ids"] == "INT64 [batch_size, sequence_length]"
    assert found["facts"]["tokenizer"]["kind"] == "bytes"
    data = bytearray((copy / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx").write_bytes(data)
    assert inspect_path(copy)["problems"] == [
        "model.onnx was changed or is damaged: its checksum is not that of SHA256SUMS."]
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in inspect_path(copy / "model.onnx")["problems"][1]


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_a_cut_file_is_named(copy, size):
    path = copy / "model.onnx"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model.onnx is no whole ONNX file"):
        inspect_path(copy)


@pytest.mark.parametrize("damage", [
    lambda data: data.replace(b"stack.0.attention.query.weight", b"stack.0.attention.query.weigh\xff"),
    lambda data: data.replace(b"dougong.family", b"dougong.famil\xff"),
    lambda data: data.replace(b"past_sequence_length", b"past_sequence_lengt\xff")])
def test_names_that_are_no_text_are_damage(copy, damage):
    path = copy / "model.onnx"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.onnx is no whole ONNX file"):
        inspect_path(copy)


def test_a_type_of_no_tensor_is_damage(copy):
    edited(copy, lambda graph: setattr(initializer(graph, "norm.weight"), "data_type", 77))
    with pytest.raises(CheckpointError, match=r"model\.onnx is no whole ONNX file.*77"):
        inspect_path(copy)


def test_inspect_checks_graphs_of_others(copy):
    (copy / "SHA256SUMS").unlink()

    def wrong(graph):
        graph.graph.node[-1].op_type = "NoSuchOperator"

    assert "no valid graph" in inspect_path(edited(copy, wrong))["problems"][0]


def test_what_is_no_decoder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Linear is no decoder"):
        write_onnx(tmp_path, torch.nn.Linear(2, 2), about={})
    assert not list(tmp_path.iterdir())


def test_large_weights_lie_beside_the_graph_in_f16_and_are_checked_there(tmp_path):
    made = model("gpt2")
    directory = written(tmp_path / "out", made, dtype="f16", one_file_bytes=1000)
    data = directory / "model.onnx_data"
    weights = sum(p.numel() for p in made.parameters())
    assert 2 * weights - 2000 <= data.stat().st_size < 2.2 * weights + 4096
    assert verified(directory, made, "f16").tokens > 300
    found = inspect_path(directory)
    assert not found["problems"] and found["facts"]["dtypes"] == ["FLOAT16"]
    assert found["facts"]["parameters"] == weights
    (directory / "SHA256SUMS").unlink()
    data.write_bytes(data.read_bytes()[:-200])
    assert any("model.onnx_data is cut off" in problem for problem in inspect_path(directory)["problems"])
    data.unlink()
    assert "which is missing" in inspect_path(directory)["problems"][0]


def test_the_snippet_of_the_card_writes_what_the_model_writes(qwen3, monkeypatch, capsys):
    made, directory = qwen3
    facts = CardFacts("n", "a", 1, 48, "f32", 0, "mit", "0", library="onnx", begins_with=None)
    code = model_card(facts).split("```python\n")[1].split("```")[0].replace("range(40)", "range(12)")
    monkeypatch.chdir(directory)
    exec(compile(code, "card", "exec"), {})
    tokens = torch.tensor([list(b"Once upon a time")])
    with torch.no_grad():
        for _ in range(12):
            tokens = torch.cat([tokens, made(tokens)[:, -1:].argmax(-1)], 1)
    from tokenizers import Tokenizer

    assert capsys.readouterr().out.strip() == Tokenizer.from_file("tokenizer.json").decode(tokens[0].tolist()).strip()


@pytest.mark.slow
@pytest.mark.timeout(1200)      # tracing experts takes its time on a busy machine
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_every_family_is_read_alike(name, tmp_path):
    """Every arrangement of the contract: positions of all kinds, windows, experts, value embeddings, soft caps."""
    from dougong.interop.verify import compare_logits

    made = model_of(name, torch.float32)
    write_onnx(tmp_path, model_of(name, torch.float32), about={})
    session = Session(tmp_path / "model.onnx", cache_names(made))
    rows = [row.tolist() for row in tokens_of(4, 30)] + [[7]]     # and three of padding, of a context of 40
    for reading in (session.whole, session.stepwise, session.padded):
        assert compare_logits(made, reading, rows, name, texts=0).tokens == 121
