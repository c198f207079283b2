"""GGUF files: read back by transformers, refused by name where llama.cpp would compute something else."""

import dataclasses

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from dougong.core.errors import CheckpointError, ConfigError
from dougong.data.chat_template import ChatTemplate
from dougong.data.tokenizer import BytesConfig, Tokenizer
from dougong.data.turns import CHATML, TURN_TOKENS, with_turns
from dougong.interop import gguf_form as form_module
from dougong.interop.gguf_file import QUANTS, read_gguf, vocabulary, write_gguf
from dougong.interop.gguf_form import gguf_form
from dougong.interop.gguf_verify import _bound, verify_gguf
from dougong.interop.maps import MAPS
from dougong.interop.verify import Mismatch
from dougong.models.families.gpt2 import GPT2Config
from dougong.models.families.qwen3 import Qwen3Config
from dougong.models.families.qwen3_moe import Qwen3MoEConfig
from dougong.recipes.export import export_gguf
from dougong.recipes.open_run import open_run

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import tiny_hf  # noqa: E402


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    patch = pytest.MonkeyPatch()
    patch.setattr("dougong.recipes.open_run.usable_cores", lambda: 1)
    pre = {"gpt2": "gpt-2", "llama": "llama-bpe", "qwen3": "qwen2", "qwen3_moe": "qwen2"}
    yield {kind: open_run(tiny_hf.write(folder / kind, kind, pre_tokenizer=pre[kind])) for kind in tiny_hf.SHAPES}
    patch.undo()


@pytest.mark.parametrize("kind", tiny_hf.SHAPES)
def test_every_family_is_read_alike_by_transformers(runs, kind, tmp_path):
    exported = export_gguf(runs[kind], tmp_path / "out")
    assert exported.verified and exported.verified.tokens > 100
    fields, _ = read_gguf(tmp_path / f"out/{kind}-f32.gguf")
    expected = {"gpt2": "gpt-2", "llama": "llama-bpe"}.get(kind, "qwen2")
    assert fields["tokenizer.ggml.pre"] == expected and fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.add_bos_token"] is True
    if kind != "gpt2":
        assert fields[f"{fields['general.architecture']}.attention.key_length"] == 32
    modelfile = (tmp_path / "out/Modelfile").read_text()
    assert f"FROM ./{kind}-f32.gguf" in modelfile and 'PARAMETER stop "<|endoftext|>"' in modelfile


@pytest.mark.parametrize("make, begin", [
    (lambda plain: plain, "<|endoftext|>"), (with_turns, "<|im_start|>"),
    (lambda plain: plain.with_chat_template("{{ bos_token }}" + CHATML, TURN_TOKENS), "<|endoftext|>"),
    (lambda plain: Tokenizer(plain.backend, document_id=plain.document_id, settings={
        "bos_token": None, "add_bos_token": False}), None)], ids=["base", "chat", "chat with its own", "qwen3"])
def test_the_file_asks_for_the_token_that_the_model_began_with(make, begin, tmp_path):
    tokenizer = make(tiny_hf.tokenizer())
    words = vocabulary(tokenizer, 310)
    form = form_module.GGUFForm("qwen3", {}, {"output_norm.weight": ("norm.weight",)}, {})
    write_gguf(tmp_path / "a.gguf", form, {"norm.weight": torch.ones(4)}, words, quant="f32", name="a")
    fields, _ = read_gguf(tmp_path / "a.gguf")
    assert fields["tokenizer.ggml.add_bos_token"] is (begin == "<|endoftext|>")
    assert fields.get("tokenizer.ggml.bos_token_id") == tokenizer.begin_id
    if tokenizer.chat_template:
        ids = ChatTemplate(tokenizer).encode([{"role": "user", "content": "a"}])
        assert ids[0] == tokenizer.special_tokens[begin]


@pytest.mark.parametrize("quant", QUANTS)
def test_every_type_is_within_what_it_rounds(runs, quant, tmp_path):
    exported = export_gguf(runs["llama"], tmp_path / "out", quant=quant)
    assert exported.verified
    fields, tensors = read_gguf(tmp_path / f"out/llama-{quant}.gguf")
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name.lower() == quant
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert fields["general.file_type"] == {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9,
                                           "bf16": 32}[quant]


@pytest.mark.parametrize("quant", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "f16", "bf16"])
def test_the_bound_is_tight_but_never_too_tight(quant):
    values = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 4000)[:, None]
    values[7] = 0
    kind = gguf.GGMLQuantizationType[quant.upper()]
    again = torch.from_numpy(np.array(gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), kind), kind)))
    share = (again - values).abs() / _bound(values, quant).clamp(min=1e-30)
    assert 0.6 < share.max().item() <= 1.0


def test_without_the_permutation_no_llama_leaves(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(form_module, "_interleaved", lambda tensor, _heads: tensor)
    monkeypatch.setattr(form_module, "_halves", lambda tensor, _heads: tensor)
    with pytest.raises(Mismatch, match=r"transformers \(GGUF\) computes something else"):
        export_gguf(runs["llama"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_qwen3_that_is_permuted_does_not_leave(runs, tmp_path, monkeypatch):
    def permuted(config, hf):
        return form_module.GGUFForm("qwen3", form_module._keys(hf), form_module._layers(config, qk_norm=True),
                                    {"blk.1.attn_q.weight": 4})

    monkeypatch.setitem(form_module._FORMS, "qwen3", permuted)
    with pytest.raises(Mismatch, match="computes something else"):
        export_gguf(runs["qwen3"], tmp_path / "out")


@pytest.mark.parametrize(("key", "value", "message"), [
    ("rope.freq_base", 20_000.0, "computes something else"),
    ("attention.layer_norm_rms_epsilon", 1e-3, "computes something else"),
    ("attention.head_count_kv", 4, "cannot read what was written")])
def test_wrong_metadata_are_found_by_the_independent_reader(runs, tmp_path, monkeypatch, key, value, message):
    real = form_module._keys
    monkeypatch.setattr(form_module, "_keys", lambda hf: real(hf) | {key: value})
    with pytest.raises(Mismatch, match=message):
        export_gguf(runs["llama"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_splitting_rule_is_found(runs, tmp_path, monkeypatch):
    from dougong.recipes import export

    def wrong(tokenizer, rows):
        return dataclasses.replace(vocabulary(tokenizer, rows), pre_tokenizer="gpt-2")

    monkeypatch.setattr(export, "vocabulary", wrong)
    with pytest.raises(Mismatch, match=r"GGUF reads .* as other tokens"):
        export_gguf(runs["qwen3"], tmp_path / "out")


SIZES = {"vocab_size": 300, "context": 64, "dim": 64, "num_layers": 2, "num_heads": 4}


@pytest.mark.parametrize(("kind", "config", "message"), [
    ("gpt2", GPT2Config(**SIZES, activation="gelu"), "activation=gelu"),
    ("qwen3", Qwen3Config(**SIZES, window=8, full_layers=1), "window=8"),
    ("qwen3", Qwen3Config(**SIZES, attention_bias=True), "attention_bias"),
    ("qwen3_moe", Qwen3MoEConfig(**SIZES, num_experts=4, top_k=2, normalised=False), "normalised=false")])
def test_what_llama_cpp_has_no_place_for_is_named(kind, config, message):
    with pytest.raises(ConfigError, match=message):
        gguf_form(MAPS[kind], config)


def test_tokenizers_that_llama_cpp_would_read_otherwise_are_refused():
    with pytest.raises(ConfigError, match=r"kind bytes .* no merges"):
        vocabulary(BytesConfig().build(), 300)
    other = tiny_hf.tokenizer()
    text = other.backend.to_str().replace("{1,3}", "{1,9}").replace(r"|\\p{N}|", r"|\\p{N}{1,9}|")
    assert text != other.backend.to_str()
    from tokenizers import Tokenizer as Backend

    with pytest.raises(ConfigError, match="cuts text by a rule"):
        vocabulary(Tokenizer(Backend.from_str(text), document_id=None), 300)


def test_rows_that_blocks_do_not_divide_stay_f16_and_unused_rows_get_tokens(tmp_path):
    directory = tiny_hf.write(tmp_path / "odd", "qwen3")
    import shutil

    import transformers

    shutil.rmtree(directory)
    text = tiny_hf.tokenizer()
    shape = tiny_hf.SHAPES["qwen3"] | {"intermediate_size": 80, "vocab_size": 310}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(
        "qwen3", **shape, bos_token_id=text.document_id, eos_token_id=text.document_id))
    model.save_pretrained(directory)
    text.save(directory)
    exported = export_gguf(open_run(directory), tmp_path / "out", quant="q8_0")
    assert "f16, as blocks of 32 do not divide" in exported.notes[0]
    fields, tensors = read_gguf(tmp_path / "out/odd-q8_0.gguf")
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert len(fields["tokenizer.ggml.tokens"]) == 310 and fields["tokenizer.ggml.token_type"][-1] == 5


@pytest.mark.parametrize("size", [0, 3, 40, 2000, -50])
def test_a_cut_file_is_named(runs, tmp_path, size):
    export_gguf(runs["qwen3"], tmp_path / "out", verify=False)
    path = tmp_path / "out/qwen3-f32.gguf"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"qwen3-f32.gguf is (no whole GGUF file|cut off)"):
        read_gguf(path)


def test_one_changed_value_is_found_and_named(runs, tmp_path):
    export_gguf(runs["qwen3"], tmp_path / "out", verify=False)
    path = tmp_path / "out/qwen3-f32.gguf"
    offset = int(read_gguf(path)[1]["blk.1.ffn_up.weight"].data_offset)
    data = bytearray(path.read_bytes())
    data[offset + 2] ^= 0x40
    path.write_bytes(data)
    opened = runs["qwen3"]
    family = MAPS["qwen3"]
    with pytest.raises(Mismatch, match=r"other values in blk.1.ffn_up.weight \(f32\)"):
        verify_gguf(path, gguf_form(family, opened.recipe.model), opened.model, opened.tokenizer, [],
                    family.config_to_hf(opened.recipe.model))


def test_a_token_that_text_may_spell_is_verified_like_any_other(tmp_path):
    directory = tiny_hf.write(tmp_path / "thinks", "qwen3")
    text = tiny_hf.tokenizer(vocab_size=297)
    text.backend.add_tokens([AddedToken("<think>", special=False, normalized=False), AddedToken(
        "<|last|>", special=True, normalized=False), AddedToken("</think>", special=False, normalized=False)])
    text.save(directory)
    opened = open_run(directory)
    assert opened.tokenizer.encode("a<think>")[-1] == 297 and len(opened.tokenizer.encode("<|last|>")) > 1
    family = MAPS["qwen3"]
    export_gguf(opened, tmp_path / "out", verify=False)
    found, _ = verify_gguf(tmp_path / "out/thinks-f32.gguf", gguf_form(family, opened.recipe.model), opened.model,
                           opened.tokenizer, ["<think>\nfoxes </think>dogs"], family.config_to_hf(opened.recipe.model))
    assert found.texts > 10


def test_permutation_and_its_inverse():
    tensor = torch.arange(32.0).view(16, 2)
    stored = form_module._interleaved(tensor, 2)
    assert stored[:4, 0].tolist() == [0, 8, 2, 10] and torch.equal(form_module._halves(stored, 2), tensor)
