"""Text that a model was not trained on: all of it is scored, and a few pages are enough to calibrate on."""

from types import SimpleNamespace

import pytest
import torch
from tiny_recipe import MODELS, dougong, write_recipe, write_texts

from dougong.data.batch import Batch
from dougong.recipes.calibration import calibration
from dougong.recipes.open_run import open_run
from dougong.recipes.scoring import held_out_splits


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DOUGONG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model whose context is longer than the texts it is asked about are wide."""
    place = tmp_path_factory.mktemp("long")
    recipe = write_recipe(place / "long.yaml", write_texts(place / "texts"), model={**MODELS["qwen3"], "context": 2048},
                          train={"minutes": None, "steps": 2, "rows": 1, "micro_rows": 1, "trackers": []})
    done = dougong("train", recipe, "evaluate.baselines=false", "--run", place / "run")
    assert done.code == 0, done.err
    return place / "run"


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """20 pages in two files, one of them twice, beside a picture."""
    place = tmp_path_factory.mktemp("book")
    (page,) = write_texts(place / "pages", documents=1, words=3000).iterdir()
    text = page.read_text()
    page.unlink()
    for name, content in {"a.txt": text[:9000], "b.txt": text[9000:], "again.txt": text[:9000]}.items():
        (place / "pages" / name).write_text(content)
    (place / "pages" / "c.png").write_bytes(bytes(range(256)))
    return place / "pages"


def test_all_of_another_text_is_scored(run, book):
    told = dougong("eval", run, "--data", book, "--json")
    assert told.code == 0, told.err
    assert told.json["split"] == "all" and told.json["documents"] == 3
    assert told.json["bytes"] == sum(file.stat().st_size for file in book.glob("*.txt"))
    assert [row["name"] for row in told.json["baselines"]] == ["xz -9 per document"]     # nothing for a 5-gram to learn
    assert "all of" in told.err and "skipped, " in told.err and "c.png" in told.err


def test_a_text_shorter_than_a_row_is_scored_too(run, tmp_path):
    (tmp_path / "note.txt").write_text("just a line\n")
    told = dougong("eval", run, "--data", tmp_path, "--json")
    assert told.code == 0 and told.json["bytes"] == 12, told.err


def test_another_text_has_no_splits(run, book):
    told = dougong("eval", run, "--data", book, "--split", "test")
    assert told.code == 2 and "--split test has no effect" in told.err


def test_a_few_pages_are_enough_to_calibrate_on(run, book, tmp_path):
    told = dougong("compress", run, "--method", "gptq", "--data", book, "--out", tmp_path / "small", "--json")
    assert told.code == 0, told.err
    assert held_out_splits(open_run(run).on_data(str(book)).corpus) == ["validation", "test"]     # for --card


def test_rows_are_counted_by_their_own_length_not_the_context():
    corpus = SimpleNamespace(context=64, facts={"splits": {"train": {"packing": {"rows": 1000}}}},
                             loader=lambda split, rows, seed: iter(lambda: Batch(tokens=_rows(rows)), None))
    opened = SimpleNamespace(corpus=corpus, runtime=SimpleNamespace(device="cpu"),
                             recipe=SimpleNamespace(seed=0, model=SimpleNamespace(context=4096)))
    batches, notes = calibration(opened, tokens=4096)
    assert sum(batch["tokens"].numel() for batch in batches) == 4096 and not notes


def _rows(rows):
    return torch.zeros(rows, 64, dtype=torch.long)
