"""The page of `plan --budget`: both languages, every number with its source, no loss where none is known."""

import math
import re

import pytest

from dougong.recipes.choose import plan_budget
from dougong.report.budget_page import render_budget, trade_off, write_budget_page


@pytest.fixture(scope="module")
def inside():
    return plan_budget(budget="1 h200 x 2 weeks", memory_for_serving="1GB")


@pytest.fixture(scope="module")
def below():
    return plan_budget(budget="here x 1 hour")


def test_the_page_says_what_to_train_and_why(inside, tmp_path):
    page = write_budget_page(inside, tmp_path / "plan.html").read_text(encoding="utf-8")
    assert inside["command"] in page.replace("&#34;", '"') and f"{inside['loss']['value']:.3f}" in page
    for figure in inside["figures"]:
        assert figure["source"].split(" (arXiv")[0].split("'")[0][:40] in page
    assert "按预算规划" in page and "Plan for a budget" in page
    assert not re.search(r'(src|href)="https?://', page)


def test_numbers_are_counted_as_each_language_counts(inside):
    page = render_budget({**inside, "choice": {**inside["choice"], "parameters": 660_000, "tokens": 2.5e9}})
    assert "66.0 万 参数，25.0 亿 词元" in page and "660\u202fk parameters on 2.50\u202fB tokens" in page
    rate = next(figure for figure in inside["figures"] if figure["name"] == "rate")
    assert f">{rate['value']:.4g}<" in page


def test_no_loss_is_drawn_where_none_is_promised(inside, below):
    assert below["refused"] and "No loss is predicted" in render_budget(below)
    assert 'class="grid"' in trade_off(inside) and 'class="grid"' not in trade_off(below)


def test_what_does_not_fit_is_crossed_out_and_the_choice_is_marked(inside):
    drawn = [o for o in inside["curve"] if o["loss"] <= 1.5 * min(x["loss"] for x in inside["curve"])]
    picture = trade_off(inside)
    assert picture.count('class="fails"') == sum(not option["fits"] for option in drawn) > 0
    assert picture.count("<circle") == 1


def test_a_probe_draws_its_interval_and_lists_its_runs(inside):
    run = {"parameters": 1e6, "tokens": 2e6, "steps": 777, "bits_per_byte": 1.2345}
    probed = {**inside, "probe": {"runs": [run]}, "loss": {**inside["loss"], "interval": [1.5, 2.5], "meaning": "95 %"},
              "curve": [{**o, "interval": [0.9 * o["loss"], 1.1 * o["loss"]]} for o in inside["curve"]]}
    page = render_budget(probed)
    assert "1.500 – 2.500" in page and "777" in page and "1.2345" in page and 'fill-opacity=".14"' in page
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", str(trade_off(probed)))]
    assert all(math.isfinite(y) and 0 <= y <= 360 for y in heights)
