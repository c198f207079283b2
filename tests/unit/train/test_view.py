"""What a person sees, on a terminal and in a file."""

import io
import time

import pytest
from rich.console import Console

from dougong.core.errors import MissingExtraError
from dougong.train.trackers import open_trackers, scalars
from dougong.train.view import LiveView, Numbers, PlainView, open_view


def story():
    begin = time.time()
    for step in range(1, 41):
        yield {"event": "step", "step": step, "loss": 4.0 - step / 20, "accuracy": 0.4, "lr": 1e-3,
               "grad_norm": 0.9,
               "tokens_per_s": 5321.0, "mfu": 0.21, "memory_bytes": 1.2e9, "elapsed_s": 1.5 * step,
               "tokens": 8 * step,
               "time": begin + 1.5 * step}
        if step % 20 == 0:
            yield {"event": "evaluation", "step": step, "split": "validation", "loss": 3.0,
                   "bits_per_byte": 2.1,
                   "best": step == 20, "time": begin}
            yield {"event": "sample", "step": step, "prompt": "def f", "text": "(x):\n    return [x]",
                   "time": begin}
    yield {"event": "skip", "step": 40, "reason": "the loss is nan", "count": 1, "time": begin}


def test_plain_lines_are_few_and_complete():
    stream, now = io.StringIO(), iter(range(10_000))
    view = PlainView(Numbers("first", 50, 3.5), stream, every_s=10, clock=lambda: next(now))
    for record in story():
        view(record)
    lines = stream.getvalue().splitlines()
    assert 5 <= len(lines) <= 15
    text = "\n".join(lines)
    for piece in ("5,321", "mfu 21%", "mem 1.2 GB", "eta 0:", "2.1000 bits per byte", "best so far",
                  "at step 20",
                  "def f▸(x):⏎", "skipped     step 40: the loss is nan"):
        assert piece in text
    assert "\x1b" not in text


def test_the_live_panel_shows_the_latest_of_everything_compactly():
    stream = io.StringIO()
    view = LiveView(Numbers("first", 50, 3.5), Console(file=stream, force_terminal=True, width=100))
    for record in story():
        view(record)
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(view.render())
    view.close()
    text = console.export_text().replace("\u00a0", " ")
    for piece in ("first", "80%", "step 40/50", "1:00 < 0:15", "loss 2.0000", "bpb", "says def f", "[x]",
                  "skipped 1"):
        assert piece in text, piece
    assert len(text.splitlines()) <= 8
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_view_fits_the_stream():
    assert isinstance(open_view("x", 3, stream=io.StringIO()), PlainView)


def test_what_was_left_out_of_the_data_is_told_once_where_anything_was():
    skipped = {reason: {"count": 1200 - i, "examples": ["a"]} for i, reason in enumerate("abcde")}
    for facts, says in (({}, ""), ({"skipped": {}}, ""), ({"skipped": skipped}, "5,990 left out: 1,200 a, 1,199 b")):
        plain, live = io.StringIO(), io.StringIO()
        PlainView(Numbers("first", 50, 3.5), plain)({"event": "data", "facts": facts})
        view = LiveView(Numbers("first", 50, 3.5), Console(file=live, force_terminal=True, width=150))
        view({"event": "data", "facts": facts})
        view.close()
        assert (says in plain.getvalue() and says in live.getvalue()) and bool(plain.getvalue()) == bool(says)
        assert ("left out" in live.getvalue()) == bool(says) == ("1,197 d, …" in plain.getvalue())


def test_events_become_scalars():
    step, *_ = story()
    assert scalars(step)["train/loss"] == step["loss"] and "train/step" not in scalars(step)
    assert scalars({"event": "evaluation", "split": "test", "step": 1, "loss": 2.0, "best": True,
                    "bits_per_byte": None}) == {"test/loss": 2.0}
    assert scalars({"event": "sample"}) == {}


def test_a_tracker_that_is_not_installed_is_refused_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"dougong\[wandb\]"):
        open_trackers(("wandb",), tmp_path, run_name="x", recipe={})


def test_tensorboard_gets_the_numbers(tmp_path):
    tracker, = open_trackers(("tensorboard",), tmp_path / "tensorboard", run_name="x", recipe={})
    for record in story():
        tracker(record)
    tracker.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    points = found.Scalars("train/loss")
    assert [p.step for p in points] == list(range(1, 41)) and points[0].value == pytest.approx(3.95)
    assert found.Scalars("validation/bits_per_byte")[0].step == 20


def test_what_is_left_is_measured_anew_after_going_back():
    numbers = Numbers("a", 1000, None)
    for step, seconds in ((10, 0), (900, 890)):
        numbers.take({"event": "step", "step": step, "time": seconds})
    assert numbers.remaining_s() == pytest.approx(100)
    for step, loss in ((400, 3.0), (600, 2.0)):
        numbers.take({"event": "evaluation", "step": step, "loss": loss, "best": True})
    numbers.take({"event": "rewind", "step": 900, "to_step": 500, "time": 891})
    assert numbers.remaining_s() is None
    numbers.take({"event": "evaluation", "step": 700, "loss": 2.5, "best": False})
    assert numbers.evaluation() == "step 700 · loss 2.5000 · best loss 3.0000 at step 400"
    for step, seconds in ((510, 900), (520, 910)):
        numbers.take({"event": "step", "step": step, "time": seconds})
    assert numbers.remaining_s() == pytest.approx(480)
