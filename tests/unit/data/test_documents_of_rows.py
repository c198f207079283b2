"""A row can name the documents that it shows, in every packing, at every phase, on every process."""

import numpy as np
import pytest

from dougong.data.arrays import RegressionData
from dougong.data.prepare import TextData, prepare
from dougong.data.split import SplitConfig
from dougong.data.tokenizer import BytesConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents of 10 to 180 bytes, each of one letter pair that no other has."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(90):
        pair = chr(ord("a") + number // 26) + chr(ord("a") + number % 26)
        (folder / f"{pair}.txt").write_text(pair * (5 + number), "utf-8")
    return folder


@pytest.mark.parametrize("pack", ["windows", "best_fit"])
def test_the_documents_of_a_row_are_those_whose_text_it_holds(folder, tmp_path, pack):
    data = TextData(path=str(folder), pack=pack, split=SplitConfig(fractions=(0.8, 0.1, 0.1)))
    corpus = prepare(data, BytesConfig(), context=48, cache=tmp_path / "cache")
    halves = [corpus.loader("train", rows=6, seed=3, rank=rank, world_size=2) for rank in range(2)]
    for number in (0, 7, 40):       # the last lies in a later epoch, at another phase
        for half in halves:
            batch, named = half.batch(number), half.documents(number)
            assert len(named) == 3
            for tokens, weight, names in zip(batch["tokens"].numpy(), batch["weight"].numpy(), named):
                text = corpus.tokenizer.decode(tokens[weight > 0])
                pairs = {name.removesuffix(".txt") for name in names}
                assert len(names) == len(pairs) and pairs
                letters = {letter for pair in pairs for letter in pair}
                assert set(text) - {"\n"} <= letters | set("\ufffd") and letters <= set(text) | _short(tokens, names)


def _short(tokens, names):
    """Letters of documents that show only their separator (or one letter) at the row's edge."""
    edges = {names[0], names[-1]}
    return {letter for name in edges for letter in name[:2]} if len(tokens) else set()


def test_a_loader_goes_on_from_a_number_and_says_where_it_is(folder, tmp_path):
    corpus = prepare(TextData(path=str(folder)), BytesConfig(), context=32, cache=tmp_path / "cache")
    arrays = RegressionData(features=4, rows=20).prepare()
    for loader in (corpus.loader("train", rows=4, seed=1), arrays.loader("train", rows=6, seed=1)):
        name = "tokens" if hasattr(loader, "mixture") else "features"
        seen = [next(iter(loader))[name].numpy().copy() for _ in range(8)]
        assert loader.number == 8
        loader.seek(5)
        assert loader.number == 5 and np.array_equal(next(iter(loader))[name].numpy(), seen[5])


def test_rows_of_arrays_are_named_by_their_place():
    corpus = RegressionData(features=4, rows=20).prepare()
    loader = corpus.loader("train", rows=6, seed=1)
    for number in range(7):
        batch = next(loader)
        places = [int(one.removeprefix("row ")) for (one,) in loader.documents(number)]
        assert np.array_equal(batch["features"].numpy(), corpus.arrays("train")["features"][places])
