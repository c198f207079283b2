"""LoRA and DoRA compute what PEFT computes, forward and backward, and their files are read both ways."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

sys.path.insert(0, str(Path(__file__).parent))

from peft_reference import ours_like, random_hf, tokens, with_peft

from dougong.adapt.lora import LoRAConfig
from dougong.core.config import replace
from dougong.core.errors import CheckpointError, ConfigError
from dougong.interop.maps import MAPS
from dougong.interop.peft_form import WEIGHTS, read_peft, to_peft
from dougong.nn.lora import adapters

CASES = [(family, kind) for family in ("qwen3", "llama", "gpt2") for kind in ("lora", "dora")]
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def adapted_like(family, theirs, folder):
    """Our model with the adapter that PEFT has saved."""
    theirs.save_pretrained(folder)
    config, model = ours_like(family)
    read = read_peft(folder, MAPS[family], config)
    read.adapt.apply(model, seed=0)
    own = dict(model.named_parameters())
    assert set(read.tensors) == {name for name, p in own.items() if p.requires_grad}
    with torch.no_grad():
        for name, tensor in read.tensors.items():
            own[name].copy_(tensor)
    return config, model, read.adapt


def gradients(model, logits):
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(11), dtype=logits.dtype)
    (logits * weight).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_logits_and_gradients_are_those_of_peft(family, kind, tmp_path):
    theirs = with_peft(family, kind)
    config, ours, _ = adapted_like(family, theirs, tmp_path)
    a, b = ours(tokens()), theirs(tokens()).logits
    torch.testing.assert_close(a, b, **EXACT)
    mine, other = gradients(ours, a), gradients(theirs, b)
    assert mine and all(bool(gradient.any()) for gradient in mine.values())
    compared = set()
    for stored_name, stored in MAPS[family].names(config).items():
        module = f"base_model.model.{stored_name.removesuffix('.weight')}"
        parts = [name.removesuffix(".weight") for name in stored.ours]
        if f"{module}.lora_A.default.weight" not in other:
            continue
        # queries, keys and values of GPT-2 share one A in PEFT and have copies of it here: their gradients add up to it
        a_sum = sum(mine[f"{part}.lora_a"] for part in parts)
        torch.testing.assert_close(a_sum, other[f"{module}.lora_A.default.weight"], **EXACT)
        for leaf, key in (("lora_b", "lora_B.default.weight"), ("magnitude", "lora_magnitude_vector.default.weight")):
            if leaf == "lora_b" or kind == "dora":
                joined = torch.cat([mine[f"{part}.{leaf}"] for part in parts])
                torch.testing.assert_close(joined, other[f"{module}.{key}"], **EXACT)
                compared |= {f"{part}.{leaf}" for part in parts}
        compared |= {f"{part}.lora_a" for part in parts}
    assert compared == set(mine)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_file_written_here_is_read_by_peft_as_the_same_model(family, kind, tmp_path):
    from peft import PeftModel
    from safetensors.torch import save_file

    config, ours = ours_like(family)
    adapt = LoRAConfig(kind=kind, rank=4, alpha=12.0)
    adapt.apply(ours, seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in ours.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=draw, dtype=p.dtype) * 0.1)
    settings, tensors = to_peft(ours, MAPS[family], config, adapt, None)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, tmp_path / WEIGHTS)
    theirs = PeftModel.from_pretrained(random_hf(family), tmp_path).double()
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, **EXACT)
    read = read_peft(tmp_path, MAPS[family], config)         # and back here as it was, tensor for tensor
    assert read.adapt == adapt
    own = dict(ours.named_parameters())
    for name, tensor in read.tensors.items():
        torch.testing.assert_close(tensor, own[name].detach(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_part_of_gpt2s_joined_matrix_may_be_adapted(kind, tmp_path):
    from peft import PeftModel
    from safetensors.torch import save_file

    config, ours = ours_like("gpt2")
    adapt = LoRAConfig(kind=kind, rank=2, targets=("*.query", "*.value", "*.up"))
    adapt.apply(ours, seed=1)
    with torch.no_grad():
        for name, part in adapters(ours).items():
            part.lora_b.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    settings, tensors = to_peft(ours, MAPS["gpt2"], config, adapt, None)
    assert settings["rank_pattern"] == {"c_attn": 4} and settings["alpha_pattern"] == {"c_attn": 64}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, tmp_path / WEIGHTS)
    theirs = PeftModel.from_pretrained(random_hf("gpt2"), tmp_path).double()
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, **EXACT)


def test_ranks_and_factors_of_their_own_are_read_as_one(tmp_path):
    theirs = get_peft_model(random_hf("qwen3"), LoraConfig(
        r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 6},
        alpha_pattern={"q_proj": 9}, use_rslora=True, task_type="CAUSAL_LM")).double()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    _, ours, adapt = adapted_like("qwen3", theirs, tmp_path)
    assert adapt.rank == 6 and set(adapt.targets) == {"stack.*.attention.query", "stack.*.feed_forward.down"}
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, **EXACT)


def read_with(change, directory):
    """An adapter of PEFT's whose settings were changed."""
    with_peft("qwen3", "lora").save_pretrained(directory)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return read_peft(directory, MAPS["qwen3"], ours_like("qwen3")[0])


@pytest.mark.parametrize(("change", "says"), [
    ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"), ({"init_lora_weights": "pissa"}, "pissa"),
    ({"peft_type": "VERA"}, "VERA")])
def test_other_kinds_of_adapter_are_refused_by_name(change, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        read_with(change, tmp_path)


@pytest.mark.parametrize(("change", "says"), [
    ({"lora_alpha": None}, "lora_alpha=None"), ({"lora_alpha": "4"}, "lora_alpha='4'"), (
    {"lora_alpha": 0}, "lora_alpha=0"), ({"alpha_pattern": {"q_proj": None}}, "lora_alpha=None"),
    ({"alpha_pattern": {"(": 4}}, "alpha_pattern=.*no mapping"), ({"alpha_pattern": ["q_proj"]}, "no mapping"),
    ({"lora_dropout": None}, "lora_dropout=None"), ({"lora_dropout": "0.1"}, "lora_dropout='0.1'")])
def test_damaged_settings_are_named(change, says, tmp_path):
    with pytest.raises(CheckpointError, match=says):
        read_with(change, tmp_path)


def test_damaged_tensors_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    with_peft("qwen3", "lora").save_pretrained(tmp_path)
    held = load_file(tmp_path / WEIGHTS)
    name = next(iter(held))
    for wrong in (torch.tensor(1.0), held[name][0].clone()):
        save_file({**held, name: wrong}, tmp_path / WEIGHTS)
        with pytest.raises(CheckpointError, match=f"{name} is of shape"):
            read_peft(tmp_path, MAPS["qwen3"], ours_like("qwen3")[0])
    with_peft("gpt2", "dora").save_pretrained(tmp_path / "gpt2")
    joined = load_file(tmp_path / "gpt2" / WEIGHTS)
    short = next(key for key in joined if "c_attn" in key and "magnitude" in key)
    save_file({**joined, short: torch.ones(1)}, tmp_path / "gpt2" / WEIGHTS)
    with pytest.raises(CheckpointError, match="c_attn has magnitude of shape"):
        read_peft(tmp_path / "gpt2", MAPS["gpt2"], ours_like("gpt2")[0])
    save_file(held, tmp_path / WEIGHTS, metadata={"format": "pt"})
    data = (tmp_path / WEIGHTS).read_bytes()
    assert b'"format":"pt"' in data
    (tmp_path / WEIGHTS).write_bytes(data.replace(b'"format":"pt"', b'"format":1234'))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_peft(tmp_path, MAPS["qwen3"], ours_like("qwen3")[0])


def test_an_adapter_of_another_model_is_refused_with_its_name(tmp_path):
    with_peft("llama", "lora").save_pretrained(tmp_path)
    config = replace(ours_like("llama")[0], ffn_dim=64)
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj has lora_. of shape"):
        read_peft(tmp_path, MAPS["llama"], config)
    with pytest.raises(CheckpointError, match="no matrix that LlamaForCausalLM with 2 layers"):
        read_peft(tmp_path, MAPS["llama"], replace(config, num_layers=2, ffn_dim=48))
