"""The card's page: what it advises, what it draws, and that it loads nothing."""

import copy
import re

import pytest
from fake_card import fake_card, fake_row

from dougong.recipes.card import pareto
from dougong.report.card_page import _front, quality_bar, render_card
from dougong.report.card_words import advice, made_by, picks


def test_the_page_says_every_variant_in_both_languages_and_loads_nothing():
    page = render_card(fake_card())
    for row in fake_card()["variants"]:
        assert page.count(row["name"]) >= 4
    assert "Compression card" in page and "压缩卡片" in page
    assert not re.search(r"(?:src|href)=\"(?!data:|#)|https?://", page)
    assert "default-src 'none'" in page and "NaN" not in page and "None" not in page


def test_names_of_documents_cannot_leave_their_place():
    page = render_card(fake_card())
    assert "&lt;script&gt;.py" in page and "<script>.py" not in page


def test_the_front_is_what_no_other_beats():
    assert _front([(8, 1.0), (2, 1.1), (2, 1.2), (1, 1.5), (3, 1.1)]) == [3, 1, 0]
    rows = fake_card()["variants"]
    for row, best in zip(rows, pareto(rows)):
        beaten = any(other["memory_bytes"] <= row["memory_bytes"] and other["bits_per_byte"] <= row["bits_per_byte"]
                     and other["tokens_per_s"]["1"]["median"] >= row["tokens_per_s"]["1"]["median"] and other is not row
                     for other in rows)
        assert best is not beaten


def _rows(*rest):
    return [fake_row("whole", "whole", 8_000_000, 32.0, 0.0, 900.0), *rest]


def _integers(name, disk, relative, speed, bits=4):
    return fake_row(name, "integers", disk, disk / 250_000, relative, speed, bits=bits, group=32, method="gptq",
                    activations="float")


def test_it_advises_the_smallest_nobody_tells_apart_then_a_smaller_one_worth_its_price():
    rows = _rows(_integers("eight", 2_300_000, 0.001, 1000.0, 8), _integers("four", 1_200_000, 0.02, 1500.0),
                 _integers("bad", 1_100_000, 0.2, 3000.0))
    assert {use: row["name"] for use, row in picks(rows).items()} == {
        "everyday": "eight", "small": "four", "fast": "four", "many": "four"}
    said = advice(rows)
    assert said.en.startswith("Take eight for everyday use (3.5") and "keep whole" in said.en and "bad" not in said.en
    assert said.zh.startswith("日常使用时选 eight")


def test_where_nothing_is_good_it_advises_to_keep_the_original():
    rows = _rows(_integers("bad", 1_100_000, 0.2, 3000.0))
    assert picks(rows) == {} and "keep whole" in advice(rows).en
    assert render_card({**fake_card(), "variants": rows})


def test_bars_of_quality_begin_at_zero_and_grow_with_the_loss():
    rows = fake_card()["variants"]
    by_loss = sorted((row for row in rows if row["relative"] >= 0), key=lambda row: row["relative"])
    bars = [quality_bar(row, rows) for row in by_loss]
    assert all(bar.x == pytest.approx(bars[0].zero) for bar in bars)
    assert [bar.width for bar in bars] == sorted(bar.width for bar in bars)
    better = quality_bar(next(row for row in rows if row["relative"] < 0), rows)
    assert better.x < better.zero and better.x + better.width == pytest.approx(better.zero)


def test_one_document_gives_no_interval_and_still_a_page():
    card = copy.deepcopy(fake_card())
    for row in card["variants"]:
        row["difference_interval"] = row["interval"] = None
    assert render_card(card)


def test_how_a_variant_was_made_is_said():
    original, *_ = rows = fake_card()["variants"]
    said = [made_by(row, original).en for row in rows]
    assert said[1] == "int8, rtn, groups of 32" and said[4].endswith("trained for it")
    assert said[6] == "made smaller, then trained on"
    assert made_by({**rows[6], "parameters": original["parameters"]}, original).en == "trained on"
