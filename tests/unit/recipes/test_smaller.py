"""Runs made smaller by the command line: ordinary runs, and the card that compares them."""

import json
from types import SimpleNamespace

import pytest
from feedback_runs import write_feedback_recipe, write_pairs, write_tasks
from tiny_recipe import MODELS, dougong, write_recipe, write_texts

from dougong.core.run import RunDirectory
from dougong.data.documents import Document
from dougong.models import FAMILIES
from dougong.recipes.card import _read_bytes, _some, variants_of
from dougong.recipes.open_run import open_run
from dougong.recipes.recipe import recipe_from_run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("smaller")
    train = {"minutes": None, "steps": 10, "rows": 8, "micro_rows": 8, "trackers": []}
    recipe = write_recipe(root / "tiny.yaml", write_texts(root / "texts"), model={**MODELS["qwen3"], "ffn_dim": 128},
                          tokenizer={"kind": "bpe", "vocab_size": 330}, train=train, sample={"prompts": []},
                          evaluate={"tokens": 500, "baselines": False})
    assert dougong("train", recipe, "--run", root / "base").code == 0
    return root / "base"


@pytest.fixture(scope="module")
def variants(base):
    """One of each kind."""
    asked = {"int4-gptq": ("--to", "int4", "--method", "gptq"), "int4-awq": ("--to", "int4", "--method", "awq"),
             "pruned": ("--prune", "0.3"), "trimmed": ("--trim-vocabulary", "--least", "400")}
    made = {}
    for name, arguments in asked.items():
        done = dougong("compress", base, *arguments, "--json")
        assert done.code == 0, done.err
        made[name] = done.json
    return made


def test_divergence_is_measured_on_several_documents_where_some_are_short():
    texts = ["a" * length for length in (900, 10, 20, 800, 30, 700)]
    documents = [Document(id=str(number), source="", text=text) for number, text in enumerate(texts)]
    letters = SimpleNamespace(encode=list)
    assert [int(one.id) for one in _some(documents, letters, 240)] == [1, 2, 4, 0]
    assert [int(one.id) for one in _some(documents[:1], letters, 240)] == [0]


def test_a_pruned_run_is_opened_scored_and_trained_on_like_any_other(base, variants, tmp_path):
    pruned = base.with_name("base-pruned")
    assert variants["pruned"]["parameters"] <= 0.7 * variants["pruned"]["parameters_before"]
    scored = dougong("eval", pruned, "--no-baselines", "--json")
    assert scored.code == 0 and scored.json["step"] == 0
    recipe = base.with_name("tiny.yaml")
    trained = base.with_name("base-pruned-more")
    more = dougong("train", recipe, "--model", pruned, "--run", trained, "train.steps=8", "--json")
    assert more.code == 0, more.err
    assert more.json["result"]["bits_per_byte"] < scored.json["bits_per_byte"]
    assert open_run(trained).recipe.model == open_run(pruned).recipe.model
    assert trained in variants_of(base)


def test_a_trimmed_run_has_its_own_tokenizer_wherever_it_lies(base, variants, tmp_path):
    trimmed = base.with_name("base-trimmed")
    moved = trimmed.rename(tmp_path / "elsewhere")
    opened = open_run(moved)
    assert opened.recipe.model.vocab_size == opened.tokenizer.vocab_size == variants["trimmed"]["vocabulary"] < 330
    assert dougong("eval", moved, "--no-baselines").code == 0
    text = "abcd efgh 斗拱 \u0000"
    assert opened.tokenizer.decode(opened.tokenizer.encode(text)) == text
    moved.rename(trimmed)


def test_qat_then_rounding_gives_the_model_that_was_trained(base):
    recipe, qat = base.with_name("tiny.yaml"), base.with_name("base-qat")
    done = dougong("train", recipe, "--model", base, "--run", qat, "adapt.kind=qat", "train.steps=4", "--json")
    assert done.code == 0, done.err
    assert dougong("compress", qat, "--to", "int4").code == 0
    scores = [dougong("eval", run, "--no-baselines", "--json").json["bits_per_byte"]
              for run in (qat, base.with_name("base-qat-int4"))]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)
    assert scores[0] == pytest.approx(done.json["result"]["bits_per_byte"], rel=1e-6)


def test_a_qat_run_opens_without_its_start(base, tmp_path):
    recipe, qat = base.with_name("tiny.yaml"), tmp_path / "alone"
    start = base.rename(tmp_path / "start")
    try:
        assert dougong("train", recipe, "--model", start, "--run", qat, "adapt.kind=qat", "train.steps=2").code == 0
    finally:
        start.rename(base)
    assert dougong("eval", qat, "--no-baselines").code == 0


def test_a_qat_run_is_no_adapter(base, tmp_path):
    recipe, qat = base.with_name("tiny.yaml"), tmp_path / "whole"
    assert dougong("train", recipe, "--model", base, "--run", qat, "adapt.kind=qat", "train.steps=2").code == 0
    for command in (["export", qat, "--to", "peft"], ["generate", base, "ab", "--adapter", qat]):
        refused = dougong(*command)
        assert refused.code == 2 and f"{qat} holds a whole model, no adapter" in refused.err


def test_the_card_compares_what_was_made_from_the_run(base, variants):
    names = {path.name for path in variants_of(base)}
    assert names >= {"base-int4-gptq", "base-int4-awq", "base-pruned", "base-trimmed"}
    done = dougong("compress", base, "--card", "--json", "--with", base.with_name("base-int4-gptq"), "--with",
                   base.with_name("base-trimmed"))
    assert done.code == 0, done.err
    original, rounded, trimmed = done.json["variants"]
    assert original["difference"] == 0 and original["kl_mean"] == 0 and original["top1_agreement"] == 1
    assert rounded["kl_mean"] > 0 and rounded["disk_bytes"] < original["disk_bytes"] / 3
    assert 4 < rounded["bits_per_weight"] < 6 and trimmed["kl_mean"] is None
    assert rounded["bits_per_byte"] - original["bits_per_byte"] == pytest.approx(rounded["difference"])
    assert json.loads((base / "compression.json").read_text())["advice"]["zh"]
    assert "<script" in (base / "compression.html").read_text()


def test_runs_that_only_began_from_another_are_no_variants_of_it(base, variants):
    recipe, more = base.with_name("tiny.yaml"), base.with_name("base-more")
    assert dougong("train", recipe, "--model", base, "--run", more, "train.steps=2").code == 0
    assert more not in variants_of(base) and base not in variants_of(more)


@pytest.mark.parametrize(("arguments", "said"), [
    (("--prune", "0.3", "--to", "int4"), "different things"), (("--card", "--trim-vocabulary"), "different things"),
    (("--least", "3"), "no effect without"), (("--prune", "0.97", "--out", "new"), "no shape"),
    (("--method", "gpqt"), "gptq"),
    (("--trim-vocabulary", "--out", "."), "exists already")])
def test_what_does_not_go_together_is_said_in_one_screen(base, arguments, said):
    refused = dougong("compress", base, *arguments)
    assert refused.code == 2 and said in refused.err


def test_what_was_pruned_is_recorded(base, variants):
    _, recorded = recipe_from_run(RunDirectory(base.with_name("base-pruned")).recipe)
    assert recorded["smaller"]["how"] == "pruned" and recorded["smaller"]["run"] == "base"
    assert len(recorded["smaller"]["layers"]) == open_run(base.with_name("base-pruned")).recipe.model.num_layers


@pytest.fixture(scope="module")
def tuned(base):
    """Runs that began from it, on data that are no running text."""
    root, made = base.parent, {}
    labelled = root / "labelled.jsonl"
    labelled.write_text("".join(json.dumps({"text": f"{n} text", "label": n % 2}) + "\n" for n in range(60)))
    for kind, recipe, objective, path in (
            ("chats", "sft", "causal_lm", write_tasks(root / "tasks.jsonl")),
            ("preferences", "dpo", "reward", write_pairs(root / "pairs.jsonl")),
            ("labelled", "dpo", "classify_text", labelled)):
        spelling = {"spelling": "text"} if kind == "preferences" else {}
        asked = write_feedback_recipe(root / f"{kind}.yaml", recipe, {"kind": kind, "path": str(path), **spelling},
                                      objective=objective, train={"steps": 2, "checkpoint_every": 2})
        done = dougong("train", asked, "--model", base, "--run", root / kind)
        assert done.code == 0, done.err
        made[kind] = root / kind
    return made


@pytest.mark.parametrize("arguments", [("--to", "int4", "--method", "gptq"), ("--to", "int4", "--method", "awq"),
                                       ("--prune", "0.3")], ids=["gptq", "awq", "prune"])
@pytest.mark.parametrize("kind", ["chats", "preferences", "labelled"])
def test_a_tuned_run_is_made_smaller_by_its_own_data_or_told_to_name_text(tuned, tmp_path, kind, arguments):
    done = dougong("compress", tuned[kind], *arguments, "--out", tmp_path / "out")
    if kind == "labelled":
        assert done.code == 2 and "--data" in done.err
        done = dougong("compress", tuned[kind], *arguments, "--out", tmp_path / "out", "--data",
                       tuned[kind].parent / "texts")
    assert done.code == 0, done.err
    assert hasattr(open_run(tmp_path / "out").model, "value") == (kind != "chats")


@pytest.mark.parametrize("kind", ["chats", "preferences", "labelled"])
def test_tokens_of_a_tuned_run_are_counted_in_text_that_is_named(tuned, tmp_path, kind):
    asked = ("compress", tuned[kind], "--trim-vocabulary", "--least", "400", "--out", tmp_path / "out")
    refused = dougong(*asked)
    assert refused.code == 2 and "--data" in refused.err
    done = dougong(*asked, "--data", tuned[kind].parent / "texts")
    assert done.code == 0, done.err
    assert hasattr(open_run(tmp_path / "out").model, "value") == (kind != "chats")


def test_a_token_reads_the_experts_that_it_visits_and_a_row_of_each_table():
    model = FAMILIES["qwen3_moe"](vocab_size=50, context=16, dim=32, num_layers=2, num_heads=2, num_kv_heads=1,
                                  head_dim=16, num_experts=8, top_k=2, tied=False).build()
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    rest = sum(sizes.values()) - experts - sizes["stem.tokens.weight"]
    assert _read_bytes(SimpleNamespace(model=model)) == rest + experts // 4 and experts > rest / 2
