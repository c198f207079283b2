"""The dial: from a size to a whole recipe, every value with its reason, whatever is given left alone."""

import dataclasses

import pytest

from dougong.core.config import field_docs, to_dict
from dougong.core.errors import ConfigError
from dougong.models import count
from dougong.recipes import RECIPES
from dougong.recipes.assemble import prepare_data, settle_intervals
from dougong.recipes.derive import fit_to_data, fit_to_time, parse_size, resolve
from dougong.recipes.recipe import Recipe, load_recipe, recipe_from_run

SIZES = ["600K", "1M", "2M", "5M", "20M", "124M", "350M", "1B"]
HERE = ["runtime.device=cpu", "runtime.precision=fp32", "runtime.threads=1"]


def resolved(*overrides, base="first"):
    return resolve(load_recipe(base, [*HERE, *overrides])[0])


def with_data(recipe):
    """The dial's vocabulary taken as the data's: BPE reaches it."""
    return fit_to_data(recipe, {"vocab_size": recipe.tokenizer.vocab_size})[0]


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "nano"])
@pytest.mark.parametrize("size", SIZES)
def test_the_exact_count_is_near_the_size(family, size):
    recipe, _ = resolved(f"model={family}", f"size={size}")
    total = count.parameters(with_data(recipe).model)["total"]
    assert abs(total / parse_size(size) - 1) < 0.15, f"{total:,}"
    model = recipe.model
    assert 20 <= model.dim / model.num_layers <= 160, "a usual proportion"


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("size", ["100K", "315K", "681K", "1.3M", "2M"])
def test_small_models_have_heads_wide_enough_to_learn_to_copy(family, size):
    model = resolved(f"model={family}", f"size={size}")[0].model
    assert model.num_heads >= 2 and model.head_dim >= 64 and model.num_heads * model.head_dim >= model.dim


def test_the_first_model_begins_with_a_head_that_looks_back():
    assert resolved()[0].model.previous_token_head
    assert not hasattr(resolved("model.kind=llama")[0].model, "previous_token_head")


@pytest.mark.parametrize("model", [["model=qwen3_moe"], ["model=nano", "model.feed_forward=moe"]])
def test_the_dial_knows_no_experts_and_says_so(model):
    with pytest.raises(ConfigError, match=r"experts.*Leave size out"):
        resolved(*model)


@pytest.mark.parametrize(("text", "value"), [("800K", 800_000), ("2M", 2_000_000), ("1.5b", 1_500_000_000)])
def test_sizes_are_read(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "M", "2", "2X", "-1M", "0M", "nanM", "infB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="2M"):
        parse_size(text)


@pytest.mark.parametrize(("key", "value"), [
    ("model.dim", 192), ("model.num_layers", 3), ("model.context", 64), ("tokenizer.vocab_size", 700),
    ("train.rows", 5), ("train.steps", 77), ("optim.lr", 0.5), ("optim.adamw_lr", 0.25), ("model.num_heads", 3)])
def test_what_is_given_stays_and_is_not_called_derived(key, value):
    recipe, derived = resolved(f"{key}={value}")
    section, leaf = key.split(".")
    assert getattr(getattr(recipe, section), leaf) == value
    assert key not in {item.key for item in derived}


@pytest.mark.parametrize("overrides", [[], ["model=llama", "optim=adamw"], ["model=gpt2", "size=20M"],
                                       ["model=nano", "train.minutes=null"], ["optim=adam"]])
def test_every_derived_value_is_filled_before_training(overrides):
    recipe, derived = resolved(*overrides)
    recipe, more = fit_to_time(with_data(recipe), 0.1)
    recipe, intervals = settle_intervals(recipe, 0.1)
    open_keys = [f"{name}.{key}" for name, section in sections(recipe) for key in must_be_filled(section)
                 if getattr(section, key) is None]
    # found by a probe of the memory, or read as "the context"
    assert set(open_keys) <= {"train.micro_rows", "evaluate.stride"}, open_keys
    derived += more + intervals
    assert len({item.key for item in derived}) == len(derived), "a value was derived twice"
    for item in derived:
        section, _, leaf = item.key.rpartition(".")
        assert getattr(getattr(recipe, section), leaf) == item.value and item.reason


def sections(recipe):
    return [(f.name, getattr(recipe, f.name)) for f in dataclasses.fields(recipe)
            if dataclasses.is_dataclass(getattr(recipe, f.name))]


def must_be_filled(section):
    """Fields whose description says that they are derived."""
    return [name for name, doc in field_docs(type(section)).items() if "derived:" in doc]


def test_the_fields_that_say_derived_are_found():
    recipe = RECIPES["first"]()
    found = {f"{name}.{key}" for name, section in sections(recipe) for key in must_be_filled(section)}
    assert {"model.dim", "optim.lr", "optim.adamw_lr", "train.rows", "train.steps", "runtime.threads"} <= found


def test_the_rate_falls_with_the_size():
    rates = [resolved("optim=adamw", f"size={size}")[0].optim.lr for size in SIZES]
    assert rates == sorted(rates, reverse=True) and rates[0] > 3 * rates[-1]
    beside_muon = [resolved(f"size={size}")[0].optim.adamw_lr for size in SIZES]
    assert beside_muon[0] == 3e-3 and beside_muon[-1] < 1.5e-3


def test_whoever_gives_steps_takes_back_the_minutes_and_the_other_way_round():
    assert load_recipe("first", ["train.steps=9"])[0].train.minutes is None
    digits = load_recipe("digits_cnn", ["train.minutes=1"])[0].train
    assert digits.steps is None and digits.minutes == 1
    assert load_recipe("first", ["train.steps=9", "train.minutes=null"])[0].train.steps == 9


def test_two_horizons_together_are_refused():
    with pytest.raises(ConfigError, match=r"train\.minutes=60 and train\.epochs=2 .*\nGive one"):
        load_recipe("first", ["train.epochs=2", "train.minutes=60"])


@pytest.mark.parametrize(("base", "change", "says"), [
    ("first", "objective=classify", r"objective\.kind=classify is for arrays.*'classify_text'"),
    ("first", "data=digits", r"data\.kind=digits is for arrays.*text"),
    ("first", "model=cnn", r"model\.kind=cnn is for arrays"),
    ("digits_cnn", "objective=causal_lm", r"objective\.kind=causal_lm is for tokens.*Known: classify, gan"),
    ("digits_cnn", "tokenizer=bytes", r"tokenizer\.kind=bytes.*\n.*tokenizer=null")])
def test_tokens_and_arrays_do_not_go_together(base, change, says):
    with pytest.raises(ConfigError, match=says):
        resolved(change, base=base)


def test_minutes_become_steps_once():
    recipe, derived = fit_to_time(resolved("train.minutes=2")[0], 0.25)
    assert recipe.train.steps == 480 and "250 ms" in derived[0].reason
    assert fit_to_time(recipe, 99.0) == (recipe, [])


@pytest.mark.parametrize("overrides", [["size=2M", "model=cnn"], ["size=1K", "model.dim=2048"],
                                       ["model.num_heads=7", "model.dim=128", "model.num_layers=2"]])
def test_a_shape_that_cannot_be_is_refused_or_built(overrides):
    """Never an exception of our own making: either it fits or the error says what does not."""
    try:
        recipe, _ = resolved(*overrides)
        count.parameters(with_data(recipe).model)
    except ConfigError as error:
        assert len(str(error)) > 20


def test_a_size_that_is_not_the_given_shapes_is_refused():
    with pytest.raises(ConfigError, match="size=10M does not fit the model given"):
        resolved("size=10M", base="gpt2_124m")
    freed = ["model.dim=null", "model.num_layers=null", "model.num_heads=null", "model.ffn_dim=null",
             "tokenizer.vocab_size=4096"]
    recipe, _ = resolved("size=10M", *freed, base="gpt2_124m")
    assert abs(count.parameters(with_data(recipe).model)["total"] / 10e6 - 1) < 0.15


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    recipe, _ = resolved("model.vocab_size=100", "tokenizer.vocab_size=512")
    with pytest.raises(ConfigError, match="smaller than the tokenizer's 512"):
        fit_to_data(recipe, {"vocab_size": 512})


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_shipped_recipe_is_told_about_resolves_and_survives_its_file(name, tmp_path):
    from dougong.core.config import dump_yaml

    if name == "distil":
        with pytest.raises(ConfigError, match=r"objective\.teacher=RUN"):
            resolve(load_recipe(name, HERE)[0])
        return
    recipe, _ = load_recipe(name, [*HERE, "data.path=/texts"] if name.startswith("shakes") else HERE)
    if recipe.model is None:
        with pytest.raises(ConfigError, match="--model"):      # it begins from one that exists
            resolve(recipe)
    else:
        recipe, _ = resolve(recipe)
    assert recipe.name == name and recipe.about
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_yaml(recipe) + dump_yaml({"resolved": {"base": name}}))
    again, recorded = recipe_from_run(path)
    assert again == recipe and recorded == {"base": name} and isinstance(again, Recipe)
    assert to_dict(again) == to_dict(recipe)


def test_a_file_may_stand_on_another_file(tmp_path):
    (tmp_path / "a.yaml").write_text("base: first\nsize: 5M\n")
    (tmp_path / "my own.yaml").write_text("base: a.yaml\ntrain: {steps: 7}\n")
    recipe, base = load_recipe(str(tmp_path / "my own.yaml"))
    assert (recipe.name, recipe.size, recipe.train.steps, recipe.train.minutes) == ("my-own", "5M", 7, None)
    assert base.size == "5M"


@pytest.mark.parametrize("base", ["first", "mine"])
def test_what_a_run_saved_is_a_recipe_file(tmp_path, base):
    from dougong.core.config import dump_yaml

    made = fit_to_time(resolved("size=1M", "optim=adamw", "train.minutes=2")[0], 0.1)[0]
    (tmp_path / "again.yaml").write_text(dump_yaml(made) + dump_yaml({"resolved": {"base": base}}))
    recipe, of = load_recipe(str(tmp_path / "again.yaml"))
    assert (recipe.model, recipe.optim, recipe.train.steps) == (made.model, made.optim, 1200) and of.name == "first"
    assert load_recipe(str(tmp_path / "again.yaml"), ["train.minutes=3"])[0].train.steps is None


def test_another_checkpoint_of_the_same_start_needs_no_path(tmp_path, monkeypatch):
    from dougong.data.tokenizer import FileConfig
    from dougong.models.families.qwen3 import Qwen3Config

    found = Qwen3Config(dim=64), FileConfig(path="runs/a/tokenizer")
    monkeypatch.setattr("dougong.recipes.start.shape_of_start", lambda start: found)
    (tmp_path / "tuned.yaml").write_text("base: sft\nstart: {path: runs/a}\nmodel: {context: 128}\n")
    recipe, _ = load_recipe(str(tmp_path / "tuned.yaml"), ["start.checkpoint=3"])
    assert (recipe.start.path, recipe.start.checkpoint, recipe.model.context) == ("runs/a", "3", 128)
    with pytest.raises(ConfigError, match=r"start\.path.*required"):
        load_recipe("sft", ["start.checkpoint=last"])


@pytest.mark.parametrize(("content", "says"), [
    ("base: first\ntrain: {steps: 3}\ntrain: {rows: 3}\n", "line 3: the key 'train' stands here again"),
    ("base: first\ntrain:\n\tsteps: 3\n", "line 3: found character")])
def test_a_file_that_yaml_does_not_take_is_refused_with_the_line(tmp_path, content, says):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ConfigError, match=says):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_a_start_decides_rate_rows_and_their_length(tmp_path):
    from dougong.core.config import replace
    from dougong.models.families.qwen3 import Qwen3Config
    from dougong.recipes.derive import fit_to_rows
    from dougong.recipes.recipe import StartConfig

    model = Qwen3Config(vocab_size=32_000, dim=256, num_layers=4, num_heads=4, context=4096)
    begun = replace(load_recipe("sft", HERE)[0], start=StartConfig(path=str(tmp_path)), model=model, tokenizer="bytes")
    recipe, derived = resolve(begun)
    reasons = {item.key: item for item in derived}
    assert recipe.data.row_tokens == recipe.row_tokens == 1024 and recipe.train.rows == 4
    assert 1e-4 < recipe.optim.lr < 2.5e-4 and "0.03 of the rate of first training" in reasons["optim.lr"].reason
    assert fit_to_rows(recipe, 25)[0].train.rows == 2 and fit_to_rows(recipe, 3)[0].train.rows == 1
    assert fit_to_rows(recipe, 1000) == (recipe, []) == fit_to_rows(recipe, None)
    with pytest.raises(ConfigError, match="context of 4096"):
        resolve(replace(begun, data=replace(begun.data, row_tokens=5000)))


def test_data_of_64_bits_are_trained_on_where_apples_gpu_would_be_chosen(monkeypatch):
    from dougong.recipes import derive

    monkeypatch.setattr(derive, "best_device", lambda: "mps")
    monkeypatch.setattr(derive, "check_device", lambda device: None)
    recipe, _ = load_recipe("linear_regression", [])
    settled, derived = resolve(recipe)
    assert recipe.data.precision == "float64" and settled.runtime.device == "cpu"
    assert any(item.key == "runtime.device" and "float64" in item.reason for item in derived)
    with pytest.raises(ConfigError, match=r"runtime\.device=cpu"):
        resolve(load_recipe("linear_regression", ["runtime.device=mps"])[0])


@pytest.mark.parametrize("name", ["gpt2_124m", "qwen3_1b", "shakespeare_char_cpu", "shakespeare_char"])
def test_recipes_for_a_text_of_ones_own_ask_for_it_before_anything_is_read(name):
    recipe, _ = load_recipe(name)
    with pytest.raises(ConfigError, match=r"text of your own.*data\.path"):
        prepare_data(recipe)
