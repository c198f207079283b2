"""`make chaos`: everything that may happen to a run, done to a run, with how it must end.

A test is a row of a table: `@pytest.mark.chaos(done, must=…)`, and it tells what it saw by `told("…")`. The table is
printed at the end and written as JSON. Rows marked slow are left out of the short form.
"""

import sys
from pathlib import Path

import pytest
import table
from ends import RunDirectory
from lives import Life
from tiny_recipe import write_recipe, write_texts

STEPS = 60
_rows: dict[str, table.Row] = {}


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=10, help="processes killed at random moments (make chaos: 100)")
    parser.addoption("--chaos-json", default="build/chaos.json", help="where the table goes as JSON")


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A folder with a recipe of two seconds: dropout, averaged weights, Muon and AdamW, evaluations, samples."""
    folder = tmp_path_factory.mktemp("chaos")
    write_recipe(folder / "tiny.yaml", write_texts(folder / "texts"), train={
        "minutes": None, "steps": STEPS, "rows": 8, "micro_rows": 4, "ema": {"decay": 0.9}, "evaluate_every": 20,
        "sample_every": 30, "checkpoint_every": 5, "trackers": []})
    return folder


@pytest.fixture(scope="session")
def undisturbed(lab):
    """The life to which nothing is done. It is lived twice: the first also loads what a later one finds loaded."""
    for name in ("first", "reference"):
        ended = Life(lab, "train", lab / "tiny.yaml", "--run", lab / name).end()
        assert ended.code == 0, ended.err
    return ended


@pytest.fixture(scope="session")
def reference(lab, undisturbed):
    """Its run."""
    return RunDirectory(lab / "reference")


@pytest.fixture(scope="session")
def reference_s(undisturbed):
    """How long it took, from start-up to the report: a moment in it is drawn from this."""
    return undisturbed.seconds


@pytest.fixture
def told(request):
    """Adds a sentence to the row: what was seen, with numbers."""
    return request.node.stash.setdefault(_SAID, []).append


_SAID = pytest.StashKey[list[str]]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    mark = item.get_closest_marker("chaos")
    if mark is None or not (report.when == "call" or report.outcome != "passed"):
        return
    ended = "; ".join(item.stash.get(_SAID, []))
    if report.outcome != "passed":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(call.excinfo.value).split("\n")[0]
        ended = "; ".join(filter(None, [ended, reason[:300]]))
    _rows[item.nodeid] = {"test": item.nodeid.rpartition("/")[2], "done": mark.args[0], "must": mark.kwargs["must"],
                          "ended": ended, "outcome": report.outcome, "seconds": round(report.duration, 1)}


def pytest_terminal_summary(terminalreporter, config):
    if not _rows:
        return
    rows = list(_rows.values())
    path = Path(config.getoption("--chaos-json"))
    table.write(rows, path, command=["pytest", *sys.argv[1:]])
    terminalreporter.section("chaos")
    terminalreporter.write_line(table.printed(rows))
    passed = sum(row["outcome"] == "passed" for row in rows)
    terminalreporter.write_line(f"{passed} of {len(rows)} ended as they must; {path}")
