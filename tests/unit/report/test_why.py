"""The explanation is worked out from event files alone, and says something useful of every run."""

import json

import pytest

from dougong.core.run import RunDirectory
from dougong.report import write_report
from dougong.report.why import explain
from dougong.report.why_spiked import first_to_grow
from dougong.report.words import PHRASES

USUAL = {"data": 0.002, "wait": 0.001, "forward": 0.03, "backward": 0.06, "norm": 0.001, "optimizer": 0.006}


def step(number, attempt=1, **changes):
    phases = {**USUAL, **changes.pop("phases", {})}
    return {"event": "step", "time": 1000.0 + number, "attempt": attempt, "step": number, "loss": 3.0 + number % 5 / 10,
            "grad_norm": 1.0 + number % 3 / 10, "mfu": 0.4, "tokens": number * 100, "tokens_per_s": 1000.0,
            "elapsed_s": number * 0.1, "phases": phases, **changes}


def start(step=0, attempt=1):
    return {"event": "start", "time": 999.0, "attempt": attempt, "step": step}


def event(kind, **fields):
    return {"event": kind, "time": 2000.0, "attempt": 1, **fields}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: demo\ntokenizer: bytes\n", encoding="utf-8")

    def written(*logs):
        directory = RunDirectory(tmp_path)
        for old in tmp_path.glob("events*"):
            old.unlink()
        for rank, events in enumerate(logs):
            text = "".join(json.dumps(one) + "\n" for one in events)
            directory.events_of(rank).write_text(text, encoding="utf-8")
        return explain(directory)

    return written


def sentences(why):
    return " ".join(text.en for text in [*why.slow_sentences, *why.spiked_sentences])


def test_a_healthy_run_needs_no_explanation_but_gets_its_figures(run):
    why = run([start(), *(step(n) for n in range(1, 41))])
    assert why.slow.steps == 40 and why.slow.step_s == pytest.approx(0.1)
    assert why.slow.share("backward") == pytest.approx(0.6) and why.slow.total_s == pytest.approx(4.0)
    assert sentences(why).startswith("Nothing to explain: 96") and "no step was skipped" in sentences(why)
    assert "Not input-bound: waiting for batches took 2" in sentences(why) and "40" in sentences(why)
    assert why.rank_table() == ([], []) and not why.outlier_table()[1] and not why.trouble_table()[1]


def test_a_run_without_phases_says_so(run):
    events = [start(), *({**step(n), "phases": None} for n in range(1, 5))]
    assert "no times by phase" in sentences(run(events)) and run(events).to_dict()["slow"] is None
    assert "no times by phase" in sentences(run([]))


def test_waiting_for_data_and_frequent_evaluations_are_named(run):
    slow = [start(), *(step(n, phases={"data": 0.1, "evaluation": 0.05, "checkpoint": 0.002}) for n in range(1, 41))]
    said = sentences(run(slow))
    assert "Input-bound: 40" in said and "Evaluation took 20" in said and "train.evaluate_every" in said
    assert "Checkpoints took" not in said and "Nothing to explain: 96" not in said


def test_events_that_sum_up_several_steps_count_as_those(run):
    every = [start(), *(step(n, phases={name: 5 * value for name, value in USUAL.items()}) for n in range(5, 45, 5))]
    why = run(every)
    assert why.slow.steps == 40 and why.slow.step_s == pytest.approx(0.1) and why.slow.total_s == pytest.approx(4.0)


def test_a_resumed_run_counts_each_attempts_steps_from_its_start(run):
    why = run([start(), *(step(n) for n in range(1, 11)), start(8, 2), *(step(n, 2) for n in range(9, 13))])
    assert why.slow.steps == 14


def test_a_run_that_went_back_counts_every_step_it_did(run):
    def tens(*numbers):
        return [step(n, phases={name: 10 * value for name, value in USUAL.items()}) for n in numbers]

    went = event("rewind", step=130, to_step=100, first_batch=115, last_batch=129)
    slow = run([start(), *tens(*range(10, 140, 10)), went, *tens(*range(110, 300, 10))]).slow
    assert slow.steps == 320 and slow.step_s == pytest.approx(0.1) and not slow.outliers
    halfway = {**went, "step": 127}     # the time of steps 121 to 127 comes with that of 101 to 110
    more = step(110, phases={name: 17 * value for name, value in USUAL.items()})
    slow = run([start(), *tens(*range(10, 130, 10)), halfway, more, *tens(120, 130)]).slow
    assert slow.steps == 157 and slow.step_s == pytest.approx(0.1) and not slow.outliers


def rank_log(numbers, **phases):
    return [event("step", step=n, phases={**USUAL, **phases}) for n in numbers]


def test_the_process_that_others_wait_for_is_named_with_its_phase(run):
    numbers = range(1, 31)
    first = [start(), *(step(n, phases={"wait": 0.05}) for n in numbers)]
    waiting = rank_log(numbers, wait=0.05)
    why = run(first, waiting, rank_log(numbers, data=0.052, wait=0.0), waiting)
    assert why.slow.straggler["rank"] == 2 and why.slow.straggler["phase"] == "data"
    assert why.slow.straggler["late_s"] == pytest.approx(0.05) and why.slow.straggler["others_wait_s"] > 0.05
    assert "Process 2 holds the others up" in sentences(why) and "50 ms" in sentences(why).replace("\u202f", " ")
    heads, rows = why.rank_table()
    assert len(rows) == 4 and len(heads) == len(rows[0])


def test_processes_of_an_earlier_attempt_are_not_compared(run):
    first = [start(), *(step(n) for n in range(1, 11)), {**start(10, 2), "time": 1010.5},
             *(step(n, 2) for n in range(11, 31))]
    late = [{**one, "time": 1005.0} for one in rank_log(range(1, 11), data=0.5)]
    assert run(first, [{**one, "time": 1020.0} for one in rank_log(range(11, 31))], late).slow.ranks.keys() == {0, 1}


def test_equal_processes_are_called_even(run):
    numbers = range(1, 31)
    why = run([start(), *(step(n) for n in numbers)], rank_log(numbers, forward=0.031))
    assert "No process holds the others up" in sentences(why)


def test_a_slow_step_is_listed_with_what_it_waited_for(run):
    numbers = range(1, 31)
    first = [start(), *(step(n, phases={"wait": 0.9} if n == 17 else {}) for n in numbers)]
    late = [event("step", step=n, phases={**USUAL, **({"forward": 0.93} if n == 17 else {})}) for n in numbers]
    (slow,) = run(first, late).slow.outliers
    assert (slow.step, slow.phase, slow.rank) == (17, "forward", 1) and slow.times == pytest.approx(10, rel=0.05)
    (alone,) = run([start(), *(step(n, phases={"gc": 0.5} if n == 9 else {}) for n in numbers)], []).slow.outliers
    assert (alone.step, alone.phase, alone.rank) == (9, "gc", None)


def test_a_slow_step_done_again_is_blamed_on_what_it_waited_for_then(run):
    def log(slow, late):
        return [start(), *(step(n, phases={late: 0.9} if slow and n == 17 else {}) for n in range(1, 21)),
                event("rewind", step=20, to_step=10), *(step(n) for n in range(11, 31))]

    (slow,) = run(log(True, "wait"), log(True, "forward")).slow.outliers
    assert (slow.step, slow.phase, slow.rank) == (17, "forward", 1)
    once = [start(), *(step(n, phases={"gc": 0.5} if n == 9 else {}) for n in range(1, 11))]
    (slow,) = run([*once, start(8, 2), *(step(n, 2) for n in range(9, 31))]).slow.outliers
    assert (slow.step, slow.phase) == (9, "gc")


def test_the_cost_of_slow_steps_is_that_of_all_listed_or_not(run):
    why = run([start(), *(step(n, phases={"data": 1.002} if n > 70 else {}) for n in range(1, 101))])
    assert len(why.slow.outliers) == 12 and why.slow.more_outliers == 18
    assert "or more: 30. Together they cost 30 s" in sentences(why).replace("\u202f", " ")
    fives = [step(n, phases={**{name: 5 * value for name, value in USUAL.items()}, **({"gc": 2.0} if n == 50 else {})})
             for n in range(5, 105, 5)]
    assert run([start(), *fives]).slow.outliers_cost_s == pytest.approx(2.0)


def test_a_process_that_began_a_moment_earlier_is_no_straggler(run):
    tens = step(10, phases={name: 10 * value for name, value in USUAL.items()})
    assert run([start(), tens], [{**start(), "time": 998.9}, tens]).slow.straggler is None


def test_a_run_that_becomes_slower_is_told(run):
    events = [start(), *(step(n, phases={"backward": 0.06 if n < 20 else 0.12}) for n in range(1, 41))]
    assert "became slower: 100 ms in the first quarter, 160 ms" in sentences(run(events)).replace("\u202f", " ")


ROWS = [{"row": 2, "loss": None, "median": 3.1, "documents": ["bad.txt"]},
        {"row": 0, "loss": 3.3, "median": 3.1, "documents": ["good.txt"]}]


def test_bad_data_are_told_from_a_bad_machine_with_batch_documents_and_layer(run):
    layers = {"embedding": [1.0, 1.1, 1.0, 1.2, 2.0], "stack.0": [2.0, 2.1, 2.0, 2.1, 40.0],
              "stack.1": [1.0, 1.0, 1.0, 9.0, 90.0]}
    first = [start(), *(step(n) for n in range(1, 31)),
             event("skip", step=12, reason="the loss is nan", count=1, batch=11, verdict="persistent", rows=ROWS),
             event("skip", step=20, reason="the gradient norm leapt", count=1, batch=19, verdict="persistent",
                   rows=ROWS),
             event("spike", step=20, steps=[16, 17, 18, 19, 20], layers=layers),
             event("fault", step=25, batch=24, verdict="transient", fault={"reason": "the loss is inf", "here": False})]
    other = [event("fault", step=25, batch=24, verdict="transient", fault={"reason": "the loss is inf", "here": True})]
    why = run(first, other)
    one, two, three = why.spiked.troubles
    assert (one.step, one.batch, one.documents) == (12, 11, ["bad.txt"]) and one.layer is None
    assert two.layer.name == "stack.1" and two.layer.step == 19 and two.layer.times == pytest.approx(9.0)
    assert three.kind == "fault" and three.ranks == [1] and three.reason == "the loss is inf"
    said = sentences(why)
    assert "Steps skipped: 2 of 30" in said and "stand out in skipped steps: bad.txt" in said
    assert "The machine of process 1 is suspect" in said and "Nothing to explain: no step" not in said
    cells = [[cell.en for cell in row] for row in why.trouble_table()[1]]
    assert cells[0][3] == "data or weights (came back)" and cells[2][3].startswith("machine of process 1")
    assert cells[1][4] == "stack.1 at step 19, 9 × its usual norm" and "good.txt" not in str(cells)


def bad(batch, document, attempt=1, **fields):
    rows = [{"row": 0, "loss": None, "median": 3.1, "documents": [document]}]
    return event("skip", step=12, attempt=attempt, reason="the loss is nan", batch=batch, rows=rows, **fields)


def test_a_step_done_again_shows_the_documents_of_its_own_batch(run):
    back = event("rewind", step=20, to_step=10)
    norms = {"a": [1.0, 1.0, 9.0], "b": [1.0, 1.0, 1.0]}
    leapt = event("spike", step=12, steps=[10, 11, 12], layers=norms)
    others = event("spike", step=12, steps=[10, 11, 12], layers={"a": norms["b"], "b": norms["a"]})
    first = [start(), bad(11, "a.txt"), leapt, back, bad(21, "c.txt"), others]
    one, two = run(first, [start(), bad(11, "b.txt"), back, bad(21, "d.txt")]).spiked.troubles
    assert (one.documents, two.documents) == (["a.txt", "b.txt"], ["c.txt", "d.txt"])
    assert (one.layer.name, two.layer.name) == ("a", "b")


def faulty(attempt, time, here):
    return event("fault", step=25, batch=24, attempt=attempt, fault={"reason": "the loss is inf", "here": here},
                 verdict="transient", time=time)


def test_a_fault_is_that_of_the_process_that_had_it_then_though_the_batch_came_again(run):
    def log(*here):
        return [start(), faulty(1, 1001.0, here[0]), event("rewind", step=30, to_step=20),
                faulty(1, 1002.0, here[1]), {**start(20, 2), "time": 1003.0}, faulty(2, 1004.0, here[2])]

    found = run(log(False, False, False), log(True, False, True), log(False, True, False)).spiked.troubles
    assert [fault.ranks for fault in found] == [[1], [2], [1]]


def test_a_process_that_came_later_is_matched_though_it_counts_fewer_attempts(run):
    first = [start(), bad(11, "a.txt", time=1001.0), {**start(10, 2), "time": 1010.0},
             bad(11, "a.txt", attempt=2, time=1011.0)]
    alone, both = run(first, [{**start(10), "time": 1009.9}, bad(11, "b.txt", time=1011.1)]).spiked.troubles
    assert (alone.documents, both.documents) == (["a.txt"], ["a.txt", "b.txt"])


def test_the_layer_that_grew_first_even_when_all_became_no_number():
    nan = first_to_grow({"steps": [1, 2, 3], "layers": {"a": [1.0, 1.0, None], "b": [1.0, 1.0, None]}})
    assert nan.all_at_once and nan.times is None and nan.step == 3
    early = first_to_grow({"steps": [1, 2, 3, 4], "layers": {"a": [1.0, 1.0, 1.0, None], "b": [1.0, 1.0, 4.0, None]}})
    assert (early.name, early.step, early.times, early.all_at_once) == ("b", 3, pytest.approx(4.0), False)
    assert first_to_grow({"steps": [1, 2], "layers": {"a": [1.0, 1.1]}}) is None


def test_leaps_that_were_taken_are_found_in_the_curve(run):
    events = [start(), *(step(n, **({"grad_norm": 50.0} if n == 90 else {})) for n in range(1, 101))]
    (leap,) = run(events).spiked.of("leap")
    assert leap.step == 90 and "leapt to 50" in leap.reason and "train.spikes={}" in sentences(run(events))


def test_going_back_and_hanging_are_told(run):
    hang = {"processes": [{"rank": 3, "step": 40, "phase": "data", "still_s": 70.0, "stack": "File loader.py, line 7"}],
            "waited_s": 65.0}
    went = event("rewind", step=30, to_step=20, first_batch=22, last_batch=29, first_leap=23, leaps=8)
    why = run([start(), step(1), went, event("hang", **hang)], [event("hang", **hang)])
    said = sentences(why).replace("\u202f", " ")
    assert "back from step 30 to 20, and passed over batches 22 to 29" in said
    assert said.count("Process 3 hung at step 41") == 1 and "“waiting for data”" in said and "1 min 05 s" in said


def test_command_prints_tables_and_json(run, capsys, tmp_path):
    from dougong.cli.report import report

    run([start(), *(step(n) for n in range(1, 31)),
         event("skip", step=12, reason="the loss is nan", count=1, batch=11, verdict="persistent", rows=ROWS)])
    report([tmp_path], out=None, why=True, as_json=True)
    told = capsys.readouterr()
    found = json.loads(told.out.splitlines()[-1])
    assert found["spiked"]["troubles"][0]["documents"] == ["bad.txt"] and found["slow"]["steps"] == 30
    for word in ("Why slow", "backward", "Why it spiked", "bad.txt", "data or weights"):
        assert word in told.err


def test_page_has_the_section_in_both_languages(run, tmp_path):
    run([start(), *(step(n) for n in range(1, 31)),
         event("skip", step=12, reason="<b>nan</b>", count=1, batch=11, verdict="persistent", rows=ROWS)])
    page = write_report([RunDirectory(tmp_path)], tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="why"' in page and "bad.txt" in page and "数据或权重" in page and "<b>nan</b>" not in page


def test_every_phase_has_its_words():
    from dougong.core.events import BETWEEN_STEPS, IN_STEP

    assert {f"phase_{name}" for name in (*IN_STEP, *BETWEEN_STEPS, "read")} <= PHRASES.keys()     # `read`: of a hang
