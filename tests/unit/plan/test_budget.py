"""Budgets, amounts of text and memory as people write them; shapes and what serving them takes."""

import itertools
import math

import pytest

from dougong.core.errors import ConfigError
from dougong.models import count
from dougong.models.families.qwen3 import Qwen3Config
from dougong.plan.budget import bytes_per_token, duration, parse_budget, parse_serving, parse_text
from dougong.plan.shapes import Shape, ladder, written
from dougong.recipes.derive import parse_size


@pytest.mark.parametrize(("text", "devices", "name", "seconds"), [
    ("8 h200 x 3 days", 8, "h200", 3 * 86_400), ("1 h200 x 1 hour", 1, "h200", 3600), ("h100×2d", 1, "h100", 172_800),
    ("rtx4090 for 12 hours", 1, "rtx4090", 43_200), ("8xh200x3d", 8, "h200", 3 * 86_400),
    ("2 rtx4090 x 1 week", 2, "rtx4090", 604_800), ("8 H200 x 0.5 days", 8, "h200", 43_200),
    ("a100-80 x 90 min", 1, "a100-80", 5400)])
def test_budgets_are_read(text, devices, name, seconds):
    budget = parse_budget(text)
    assert (budget.devices, budget.machine.name, budget.seconds) == (devices, name, seconds)


@pytest.mark.parametrize("text", ["here x 1 hour", "laptop x 60 minutes", "1 hour", "1h"])
def test_this_machine_goes_by_several_names(text):
    budget = parse_budget(text)
    assert budget.here and budget.seconds == 3600 and budget.flops_per_s("fp32") > 1e8


@pytest.mark.parametrize(("text", "seconds"), [
    ("1,5 hours", 5400), ("here x 1,5 hours", 5400), ("1.5 hours", 5400), ("1,500 s", 1500), ("here, 2 h", 7200)])
def test_a_comma_in_a_time_is_a_decimal_point_or_sets_thousands_apart(text, seconds):
    budget = parse_budget(text)
    assert budget.here and budget.seconds == seconds


@pytest.mark.parametrize(("text", "says"), [
    ("", "8 h200 x 3 days"), ("h200", "devices x time"), ("3 days x 8 h200", "devices x time"),
    ("8 h200 x 3 fortnights", "devices x time"), ("8 h300 x 3 days", "h200"), ("0 h200 x 1 h", "above 0"),
    ("h200 x 0 h", "above 0"), ("2 here x 1 h", "one machine here")])
def test_what_is_no_budget_is_refused_with_an_example(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_budget(text)


def test_flops_are_devices_times_peak_times_efficiency():
    budget = parse_budget("8 h200 x 1 day")
    assert budget.flops_per_s("bf16") == pytest.approx(8 * 989.4e12 * budget.machine.efficiency)


def test_a_machine_of_ones_own_has_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("like: rtx3090\nefficiency: 0.3\n")
    budget = parse_budget(f"4 {tmp_path}/mine.yaml x 2 hours")
    assert budget.devices == 4 and budget.machine.efficiency == 0.3 and budget.seconds == 7200


def test_text_is_bytes_tokens_or_a_folder(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 5000)
    (tmp_path / ".hidden").write_text("y" * 5000)
    assert parse_text("40GB").bytes == 40e9 and parse_text("1.5 TiB").bytes == 1.5 * 2**40
    assert parse_text("2B tokens").tokens == 2e9 and parse_text("500 tokens").tokens == 500
    assert parse_text("500,000 tokens").tokens == 500_000 and parse_text("1,234,567.5 K tokens").tokens == 1234567.5e3
    assert parse_text("1,000GB").bytes == 1e12 and parse_text("1,5GB").bytes == 1.5e9 and \
        parse_text("0,125 GB").bytes == 125e6
    assert parse_text(str(tmp_path)).bytes == 5000 and parse_text(str(tmp_path)).path == str(tmp_path)
    assert parse_text(str(tmp_path / "a.txt")).bytes == 5000
    assert math.isinf(parse_text(None).unique_tokens(2048))
    assert parse_text("40GB").amount == 40e9 and parse_text("2B tokens").amount == 2e9
    assert parse_text(str(tmp_path)).amount is None and parse_text(None).amount is None


@pytest.mark.parametrize("text", ["nowhere/at/all", "40", "-3GB", "0GB"])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(ConfigError, match="--data"):
        parse_text(text)


def test_an_empty_folder_holds_no_text(tmp_path):
    with pytest.raises(ConfigError, match="holds no text"):
        parse_text(str(tmp_path))


def test_bytes_become_tokens_by_the_vocabulary():
    assert parse_text("3GB").unique_tokens(2048) == pytest.approx(1e9)
    assert bytes_per_token(512) < bytes_per_token(2048) < bytes_per_token(131_072) <= 5


def test_memory_for_serving_has_a_precision_and_a_number_of_texts():
    for text in ("24GB int8 x 16", "24 GB int8 × 16"):
        serving = parse_serving(text)
        assert serving and (serving.bytes, serving.precision, serving.rows) == (24e9, "int8", 16)
    serving = parse_serving("24GB")
    assert serving and (serving.precision, serving.rows) == ("bf16", 1) and parse_serving(None) is None


@pytest.mark.parametrize("text", ["24", "lots", "24GB fp4", "0GB", "24GB x 0"])
def test_what_is_no_memory_is_refused(text):
    with pytest.raises(ConfigError, match="memory-for-serving"):
        parse_serving(text)


def test_serving_takes_the_weights_and_a_cache_of_keys_and_values():
    config = Qwen3Config(vocab_size=1000, context=512, dim=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32,
                         ffn_dim=256)
    shape = Shape("1M", config)
    total = count.parameters(config)["total"]
    cache = 512 * 3 * 2 * (2 * 32) * 2          # tokens x layers x (keys and values) x width x bytes
    assert shape.serving_bytes() == 2 * total + cache
    assert shape.serving_bytes("int8", rows=5) == total + 5 * cache
    assert shape.fits(None) and shape.fits(parse_serving("1GB")) and not shape.fits(parse_serving("1MB"))


def test_the_ladder_is_even_covers_its_ends_and_is_written_as_the_dial_reads_it():
    sizes = [parse_size(size) for size in ladder(1e6, 1e9)]
    ratios = [b / a for a, b in itertools.pairwise(sizes)]
    assert sizes[0] == 1e6 and sizes[-1] == 1e9 and min(ratios) > 1.4 and max(ratios) < 1.55
    assert written(2_154_434) == "2.2M" and written(68_130) == "68K" and written(999_900) == "1M"


def test_times_are_told_in_the_unit_one_would_use():
    assert [duration(s) for s in (36, 144, 5400, 259_200)] == ["36 seconds", "2.4 minutes", "1.5 hours", "3 days"]
