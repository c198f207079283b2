"""`dougong plan` on a laptop's command line."""

import json

from typer.testing import CliRunner

from dougong.cli.main import app
from dougong.core.config import from_dict
from dougong.core.errors import ConfigError
from dougong.recipes import plan_recipe
from dougong.runtime.layout import LayoutConfig

SMALL = ["size=null", "tokenizer.vocab_size=512", "model.context=128", "model.dim=64", "model.num_layers=2",
         "model.num_heads=2", "model.num_kv_heads=2", "model.head_dim=32", "model.ffn_dim=128", "train.rows=16",
         "train.steps=100"]


def plan(*arguments):
    return CliRunner().invoke(app, ["plan", "first", *SMALL, *arguments])


def test_a_plan_for_gpus_prints_draws_and_gives_json(tmp_path):
    page = tmp_path / "plan.html"
    result = plan("--gpus", "8", "--gpu", "h100", "--price", "2.5", "--html", str(page), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    best = found["best"][0]
    assert best["fits"] and best["bill"]["cost"] > 0 and best["memory_bytes"] == sum(best["memory"].values())
    assert found["work"]["tokens"] == 100 * 16 * 128
    assert found["simulated"]["peak_bytes"] > 0
    text = page.read_text()
    for harmless in ("http-equiv", "http://www.w3.org/2000/svg", "http%3A//www.w3.org/2000/svg"):
        text = text.replace(harmless, "")
    assert "http" not in text       # the page loads nothing
    assert "Memory, layout by layout" in text and "各布局的内存" in text


def test_a_layout_that_the_simulation_refuses_loses_its_place_with_the_reason(monkeypatch):
    def simulated(work, option):
        return {"peak_bytes": 2**50 if option.layout == first else 1.0, "arithmetic_bytes": 1.0, "collectives": 0,
                "seconds": 0.0, "messages": {}, "message_bytes": {}}

    gpus = ["--gpus", "8", "--gpu", "h100", "--json"]
    before = json.loads(plan(*gpus, "--no-simulate").stdout.splitlines()[-1])
    first = from_dict(LayoutConfig, before["best"][0]["layout"])
    monkeypatch.setattr(plan_recipe, "_simulated", simulated)
    after = json.loads(plan(*gpus).stdout.splitlines()[-1])
    assert after["best"][0]["name"] == before["best"][1]["name"]
    assert after["others"][0]["name"] == before["best"][0]["name"]
    assert after["others"][0]["reason"].startswith("the simulation needs 10485")
    assert "than the best" not in after["best"][0]["reason"]
    assert "than the best" in before["best"][1]["reason"], "or this shows nothing"


def test_a_plan_for_this_machine_counts_one_step_exactly():
    result = plan("--no-probe", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["devices"] == 1 and found["best"][0]["memory"]["weights"] == \
        4 * found["model"]["parameters"]["total"]


def test_an_adapter_of_a_model_that_is_only_described_is_planned_and_shown(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu"}))
    begun = ["sft", "--model", str(tmp_path), "adapt=lora", "adapt.rank=4", "train.steps=10"]
    result = CliRunner().invoke(app, ["plan", *begun, "--gpu", "rtx4090", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    inner = 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)) * 2      # rank, in plus out of 7 matrices, 2 layers
    assert found["model"]["trained"] == inner and found["best"][0]["fits"]
    shown = CliRunner().invoke(app, ["show", *begun, "--json"])
    assert shown.exit_code == 0 and json.loads(shown.stdout.splitlines()[-1])["recipe"]["model"]["dim"] == 64
    refused = CliRunner().invoke(app, ["plan", "--budget", "h200 x 1 hour", "--model", str(tmp_path)])
    assert "--budget chooses one" in str(refused.exception)


def test_wrong_machines_are_refused_in_words():
    assert "h200" in str(plan("--gpus", "8", "--gpu", "h2000").exception)
    assert "--gpu" in str(plan("--gpus", "8").exception)


def test_what_has_no_effect_beside_a_budget_is_refused():
    for option in (["--gpus", "4"], ["--gpu", "h200"], ["--price", "3"], ["--no-simulate"]):
        refused = CliRunner().invoke(app, ["plan", "--budget", "8 h200 x 3 days", *option])
        assert isinstance(refused.exception, ConfigError)
        assert "has no effect beside --budget" in str(refused.exception)
