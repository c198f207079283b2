"""Facts, numbers and curves: what is read, printed and drawn is what the run said."""

import re

import fake_runs
import numpy as np
import pytest

from dougong.report import numbers as n
from dougong.report.baselines import baselines, comparison
from dougong.report.curves import charts_of
from dougong.report.facts import read_facts
from dougong.report.headline import headline
from dougong.report.plot import Chart, Line, Reference, downsample, smooth, ticks, y_range
from dougong.report.words import PHRASES, say


def plain(text: n.Text) -> tuple[str, str]:
    return text.en.replace("\u202f", " "), text.zh.replace("\u202f", " ")


@pytest.mark.parametrize(
    ("text", "en", "zh"),
    [
        (n.exact(2064384), "2 064 384", "2 064 384"),
        (n.compact(2064384), "2.06 M", "206 万"),
        (n.compact(999_600), "1.00 M", "100 万"),
        (n.compact(1.24e8), "124 M", "1.24 亿"),
        (n.compact(999.6), "1.00 k", "1000"),
        (n.compact(20_000, trim=True), "20 k", "2 万"),
        (n.data_size(18_460_000), "18.5 MB", "18.5 MB"),
        (n.data_size(12), "12 bytes", "12 字节"),
        (n.memory_size(3 * 2**30), "3.00 GiB", "3.00 GiB"),
        (n.duration(0.35), "350 ms", "350 毫秒"),
        (n.duration(59.97), "1 min 00 s", "1 分 00 秒"),
        (n.duration(303), "5 min 03 s", "5 分 03 秒"),
        (n.duration(7500), "2 h 05 min", "2 小时 05 分"),
        (n.duration(3599.9), "1 h 00 min", "1 小时 00 分"),
        (n.duration(273_600), "3 d 04 h", "3 天 04 小时"),
        (n.significant(3e-7), "3 × 10⁻⁷", "3 × 10⁻⁷"),
        (n.significant(-0.01234), "−0.0123", "−0.0123"),
        (n.significant(9.996), "10", "10"),
        (n.percent(0.327), "33 %", "33%"),
        (n.energy(1304), "1.3 kWh", "1.3 千瓦时"),
        (n.energy(2.71), "2.71 Wh", "2.71 瓦时"),
        (n.energy(4.17e10), "41.7 GWh", "41.7 吉瓦时"),
        (n.flops_rate(7.8e11), "780 GFLOP/s", "780 GFLOP/s"),
        (n.fixed(float("nan")), "–", "–"),
        (n.moment(0), "1970-01-01 00:00 UTC", "1970-01-01 00:00 UTC"),
    ],
)
def test_numbers_read_as_people_write_them(text, en, zh):
    assert plain(text) == (en, zh)


def test_text_escapes_itself_in_both_languages():
    assert n.Text("<b>", "&").__html__() == (
        '<span class="en" lang="en">&lt;b&gt;</span><span class="zh" lang="zh-Hans">&amp;</span>'
    )
    assert n.Text.same("<").svg == "&lt;"


def test_every_phrase_has_the_same_places_in_both_languages():
    for key, (en, zh) in PHRASES.items():
        assert en and zh, key
        if key != "baseline":
            assert sorted(re.findall(r"{(\w+)}", en)) == sorted(re.findall(r"{(\w+)}", zh)), key
        assert not re.search(r"[\u4e00-\u9fff]", en), key


def test_braces_in_a_name_are_not_filled():
    assert say("details_of", name="{n} {0}").en == "Details of {n} {0}"


def test_downsampling_keeps_the_ends_and_every_extreme():
    x = np.arange(1, 100_001, dtype=float)
    y = np.random.default_rng(0).normal(size=len(x))
    y[[7, 51_234, 99_990]] = [60.0, -50.0, 40.0]
    kept_x, kept_y = downsample(x, y, 600)
    assert 300 < len(kept_x) <= 600 and (np.diff(kept_x) > 0).all()
    assert kept_x[0] == 1 and kept_x[-1] == 100_000
    assert {60.0, -50.0, 40.0} <= set(kept_y)
    assert np.array_equal(y[kept_x.astype(int) - 1], kept_y)  # real points, never averages
    assert (kept_x <= 100).sum() >= 20  # a logarithmic axis still has a line


def test_downsampling_drops_only_what_is_not_finite():
    x, y = downsample(np.arange(5.0), np.array([1.0, np.nan, 3.0, np.inf, 5.0]))
    assert x.tolist() == [0, 2, 4] and y.tolist() == [1, 3, 5]
    assert len(downsample(np.array([]), np.array([]))[0]) == 0


def test_smoothing_preserves_lines_bridges_gaps_and_removes_noise():
    line = np.linspace(5, 1, 400)
    inner = slice(0, 360)
    assert np.allclose(smooth(line, 40)[inner], line[inner])
    gapped = line.copy()
    gapped[100:103] = np.nan
    assert np.isfinite(smooth(gapped, 40)).all()
    noise = np.random.default_rng(0).normal(size=2000)
    assert smooth(noise, 80)[400:].std() < 0.3 * noise.std()
    assert np.array_equal(smooth(line, 1), line)


@pytest.mark.parametrize(("low", "high"), [(0, 1200), (1.24, 2.1), (0, 0.0123), (-3, 7e6), (2.6, 2.6001)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high, 5)
    assert 3 <= len(found) <= 8
    assert low - 1e-9 <= found[0] and found[-1] <= high + 1e-9 * abs(high)
    gaps = np.diff(found)
    assert np.allclose(gaps, gaps[0])
    assert round(float(gaps[0]) / 10 ** np.floor(np.log10(gaps[0]) + 1e-9), 6) in (1, 2, 2.5, 5)


def chart(*ys: float, kind: str = "smooth", **options) -> Chart:
    x = np.arange(1, len(ys) + 1, dtype=float)
    return Chart(
        "k",
        n.Text.same("t"),
        n.Text.same("u"),
        [Line(kind, 0, 0, n.Text.same("l"), x, np.array(ys))],
        **options,
    )


def test_the_drawn_path_goes_through_the_values():
    drawn = chart(0.0, 10.0, 5.0, from_zero=True)
    svg = str(drawn.svg((0, 3)))
    d = re.search(r'class="line smooth c0" d="M([^"]+)"', svg)[1]
    points = np.array([[float(v) for v in p.split(" ")] for p in d.split("L")])
    width, height = drawn.size
    low, high = drawn.y_range
    assert np.allclose(points[:, 0], 56 + np.array([1, 2, 3]) / 3 * (width - 56 - 18), atol=0.06)
    values = low + (height - 34 - points[:, 1]) / (height - 34 - 16) * (high - low)
    assert np.allclose(values, [0, 10, 5], atol=0.06)


def test_the_frame_holds_references_and_ignores_rare_spikes_which_are_counted():
    ys = [1.0 + 0.001 * i for i in range(999)] + [500.0]
    spiky = chart(*ys, kind="raw", references=[Reference(3.0, n.Text.same("r"))])
    low, high = spiky.y_range
    assert low < 1 and 3.0 < high < 4
    assert spiky.outside == sum(1 for y in ys if not low <= y <= high) and spiky.outside >= 1
    assert y_range([], []) == (0.0, 1.0)


def test_a_fast_fall_begins_above_the_frame_only_where_it_takes_the_room():
    falling = chart(*(2 + 8 * np.exp(-np.arange(500) / 8) - 0.0005 * np.arange(500)), falls=True)
    assert falling.starts_above and falling.y_range[1] < 4 and falling.full_range[1] > 9
    assert not chart(*np.linspace(3, 2, 500), falls=True).starts_above


def test_a_resumed_run_shows_each_step_once_and_marks_where_it_resumed(tmp_path):
    facts = read_facts(fake_runs.finished(tmp_path / "run"))
    steps = facts.series.step
    assert len(steps) == len(set(steps)) == 1198  # 1,200 less two skipped
    assert [a.first_step for a in facts.attempts] == [0, 600] and facts.attempts[0].last_step == 720
    assert [s["step"] for s in facts.skips] == [840, 852]
    loss = next(c for c in charts_of([facts]) if c.key == "loss")
    assert [(m.kind, m.step) for m in loss.marks] == [("skip", 840), ("skip", 852), ("resume", 600)]
    assert {line.kind for line in loss.lines} == {"raw", "smooth", "points"}


def test_steps_that_a_resume_went_back_behind_are_gone_even_before_they_are_repeated(tmp_path):
    writer = fake_runs.Writer(tmp_path / "run", fake_runs.recipe())
    fake_runs.start(writer)
    fake_runs.train_steps(writer, 1, 100, 1200)
    writer.attempt = 2
    fake_runs.start(writer, 50)
    fake_runs.train_steps(writer, 51, 60, 1200, seed=9)
    facts = read_facts(writer.finish())
    assert facts.series.step.tolist() == list(range(1, 61))
    assert facts.last_step == 60 and facts.attempts[0].last_step == 100


def went_back(path):
    """130 steps, back to 100, then 8 more: the run trains again what it has left."""
    writer = fake_runs.Writer(path, fake_runs.recipe())
    fake_runs.start(writer)
    fake_runs.train_steps(writer, 1, 130, 1200, skips=(95, 126))
    writer.event("rewind", step=130, to_step=100, first_batch=115, last_batch=129)
    for step in range(101, 109):
        writer.event("step", step=step, loss=3.0, elapsed_s=1000.0 + step, phases={"checkpoint": 1.0})
    return writer


def test_the_way_that_a_rewind_left_is_gone_and_its_time_is_not(tmp_path):
    writer = went_back(tmp_path / "run")
    writer.event("evaluation", step=108, split="validation", loss=3.0, seconds=2.0, elapsed_s=1500.0)
    facts = read_facts(writer.finish())
    assert facts.series.step.tolist() == [*range(1, 95), *range(96, 109)]
    assert facts.series.values["loss"][-8:].tolist() == [3.0] * 8
    assert [e["step"] for e in facts.evaluations] == [24, 60, 108] and max(s["step"] for s in facts.samples) == 60
    assert [s["step"] for s in facts.skips] == [95] and not facts.checkpoints   # that of step 130 was removed
    assert facts.last_step == 108 and facts.training_s == 1500.0
    assert (np.diff(facts.series.minutes) > 0).all()
    assert facts.evaluation_s == pytest.approx(3 * 1.8 + 2.0)       # one of them at step 120, which was left
    assert facts.waits["checkpoint"] == pytest.approx(128 * 0.0005 + 8)


def test_a_resume_from_before_a_rewind_and_a_rewind_behind_a_resume_undo_both_ways(tmp_path):
    writer = went_back(tmp_path / "run")
    writer.attempt = 2
    fake_runs.start(writer, 104)
    fake_runs.train_steps(writer, 105, 110, 1200)
    assert read_facts(writer.finish()).last_step == 110
    writer.event("rewind", step=110, to_step=90, first_batch=91, last_batch=109)
    facts = read_facts(writer.finish())
    assert facts.series.step.tolist() == list(range(1, 91)) and facts.last_step == 90
    assert [e["step"] for e in facts.evaluations] == [24, 60]


def test_an_advantage_is_what_a_model_needs_less_and_whiskers_stand_around_it(tmp_path):
    writer = fake_runs.Writer(tmp_path / "run", fake_runs.recipe())
    entry = {"name": "xz", "bits_per_byte": 1.75, "difference": -0.35, "interval": [-0.40, -0.30]}
    writer.event("result", split="test", bits_per_byte=1.4, baselines=[entry])
    facts = read_facts(writer.finish())
    (base,) = baselines(facts)
    assert base.advantage == pytest.approx(0.35) and base.interval == pytest.approx((0.30, 0.40))
    assert comparison(facts).sentences[0].en.replace("\u202f", " ").endswith("xz needs 1.75: 20 % fewer.")
    ours, theirs = comparison(facts).bars
    assert (theirs.low, theirs.high) == pytest.approx((1.70 / 1.80, 1.80 / 1.80))
    assert ours.ours and ours.length == pytest.approx(1.4 / 1.8)


def test_a_model_worse_than_its_baseline_is_not_flattered(tmp_path):
    writer = fake_runs.Writer(tmp_path / "run", fake_runs.recipe())
    entry = {"name": "5-gram", "bits_per_byte": 1.5, "difference": 0.3, "interval": [0.2, 0.4]}
    writer.event("result", split="test", bits_per_byte=1.8, baselines=[entry])
    facts = read_facts(writer.finish())
    first, second = comparison(facts).sentences
    assert "a 5-gram needs 1.50: 20" in first.en and first.en.endswith("more.") and "excludes 0" in second.en
    assert any(m.label.en == "more bits than a 5-gram" for m in headline(facts))


def test_the_strongest_baseline_is_named_first(tmp_path):
    facts = read_facts(fake_runs.finished(tmp_path / "run"))
    assert "xz -9" in comparison(facts).sentences[0].en
    against = next(m for m in headline(facts) if m.key == "against")
    assert against.value == pytest.approx((1.684 - 1.312) / 1.684)
    assert 4 <= len(headline(facts)) <= 6


def test_headline_numbers_come_from_the_run(tmp_path):
    facts = read_facts(fake_runs.finished(tmp_path / "run"))
    shown = {m.key: plain(m.text)[0] for m in headline(facts)}
    assert shown["bits_per_byte"] == "1.312" and shown["parameters"] == "2.06 M"
    assert shown["tokens"] == "9.83 M" and shown["time"] == "5 min 51 s"
