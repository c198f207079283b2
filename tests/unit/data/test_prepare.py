"""From a folder to batches: the whole way, twice, interrupted, at the same time, and with unusable data."""

import json
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from dougong.core.config import from_dict, to_dict
from dougong.core.errors import ConfigError, DataError
from dougong.core.files import default_cache
from dougong.data.dedup import DedupConfig
from dougong.data.prepare import TextData, prepare
from dougong.data.sources import FilesSource, PythonSource
from dougong.data.split import SplitConfig
from dougong.data.tokenizer import BpeConfig, BytesConfig, CharactersConfig

WORDS = ["stone", "wood", "beam", "roof", "pillar", "bracket", "斗拱", "木", "house", "gate", "tile",
         "lime", "clay", "nail", "joint", "carve", "lift", "set"]
BPE = BpeConfig(vocab_size=320, reserved=0)


def text(number: int, words: int = 60) -> str:
    return " ".join(np.random.default_rng(number).choice(WORDS, words).tolist()) + ".\n"


@pytest.fixture
def folder(tmp_path):
    for number in range(120):
        path = tmp_path / "texts" / f"{number:03d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text(number), "utf-8")
    return tmp_path / "texts"


def texts(folder, **options) -> TextData:
    return TextData(
        path=str(folder),
        dedup=DedupConfig(near=False),
        split=SplitConfig(fractions=(0.8, 0.1, 0.1)),
        **options,
    )


def files(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*"))
            if path.is_file() and path.suffix != ".lock" and path.name != "lock"}


def test_every_document_arrives_whole_in_its_split(folder, tmp_path):
    corpus = prepare(texts(folder), BPE, context=64, cache=tmp_path / "cache")
    found = []
    for split in ("train", "validation", "test"):
        for document, tokens in zip(corpus.documents(split), corpus.tokens(split).documents(), strict=True):
            assert tokens.tokens[0] == corpus.tokenizer.document_id
            assert corpus.tokenizer.decode(tokens.tokens) == document.text
            assert tokens.bytes == len(document.text.encode())
            found.append(document.text)
    assert sorted(found) == sorted(text(number) for number in range(120))


def test_facts_add_up_and_are_json(folder, tmp_path):
    corpus = prepare(texts(folder), BPE, context=64, cache=tmp_path / "cache")
    facts = json.loads(json.dumps(corpus.facts, allow_nan=False))
    size = sum(len(text(number).encode()) for number in range(120))
    assert (facts["documents"], facts["bytes"]) == (120, size)
    assert facts["tokens"] == sum(corpus.tokens(split).tokens for split in facts["splits"])
    assert facts["bytes_per_token"] == pytest.approx(size / facts["tokens"])
    assert facts["tokenizer"]["vocab_size"] == 320 and facts["tokenizer"]["encoder"] == "tiktoken"
    for split, part in facts["splits"].items():
        batches = list(corpus.batches(split, rows=5))
        weight = torch.cat([batch["weight"] for batch in batches])
        assert len(weight) == part["packing"]["rows"] and weight.sum() == part["tokens"]
        assert (weight == 0).double().mean() == pytest.approx(part["packing"]["padding_share"])
        assert part["documents"] == len(corpus.documents(split))


def test_a_second_time_nothing_is_made_again(folder, tmp_path, monkeypatch):
    first = prepare(texts(folder), BPE, context=64, cache=tmp_path / "cache")
    monkeypatch.setattr(BpeConfig, "build", None)
    monkeypatch.setattr("dougong.data.shards._write_shard", None)
    second = prepare(texts(folder), BPE, context=64, cache=tmp_path / "cache")
    assert second.facts == first.facts
    a, b = first.loader("train", rows=4, seed=1), second.loader("train", rows=4, seed=1)
    assert all(torch.equal(next(a)["tokens"], next(b)["tokens"]) for _ in range(5))


def test_changed_files_are_noticed(folder, tmp_path):
    first = prepare(texts(folder), BPE, context=64, cache=tmp_path / "cache")
    (folder / "000.txt").write_text(text(1000, words=90), "utf-8")
    assert prepare(texts(folder), BPE, context=64, cache=tmp_path / "cache").fingerprint != first.fingerprint


def test_interrupted_anywhere_the_result_is_the_same(folder, tmp_path):
    expected = prepare(texts(folder), BPE, context=64, cache=tmp_path / "whole").facts
    whole = files(tmp_path / "whole")
    stages = []
    prepare(texts(folder), BPE, context=64, cache=tmp_path / "other",
            progress=lambda done, total, what: stages.append(what))
    assert len(set(stages)) >= 4
    for number in range(len(stages)):
        calls = []

        def interrupt(done, total, what, calls=calls, number=number):
            calls.append(what)
            if len(calls) == number + 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare(texts(folder), BPE, context=64, cache=tmp_path / f"torn-{number}", progress=interrupt)
        assert prepare(texts(folder), BPE, context=64, cache=tmp_path / f"torn-{number}").facts == expected
        assert files(tmp_path / f"torn-{number}") == whole


def test_several_at_once_agree(folder, tmp_path):
    found, said = [], []

    def work():
        found.append(prepare(texts(folder), BPE, context=64, cache=tmp_path / "cache",
                             progress=lambda done, total, what: said.append(what)).facts)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found[0] == found[1] == found[2]
    assert Counter(said)["training the tokenizer (bpe)"] == 1


def test_one_stream_of_characters_is_exactly_its_characters(tmp_path):
    play = "".join(text(number) for number in range(60))
    (tmp_path / "play.txt").write_text(play, "utf-8")
    data = TextData(path=str(tmp_path / "play.txt"), split=SplitConfig(fractions=(0.9, 0.1, 0), gap_bytes=0))
    corpus = prepare(
        data, CharactersConfig(unknown="refuse", separator=False), context=32, cache=tmp_path / "cache"
    )
    cut = int(len(play) * 0.9)
    assert corpus.tokenizer.vocab_size == len(set(play[:cut]))
    for split, part in (("train", play[:cut]), ("validation", play[cut:])):
        ids = corpus.tokens(split).read(0, corpus.tokens(split).tokens)
        assert "".join(sorted(set(play))[i] for i in ids) == part
        assert sum(float(batch["weight"].sum()) for batch in corpus.batches(split, rows=7)) == len(part) - 1
    assert corpus.method == "windows"
    with pytest.raises(DataError, match="'test' has no documents"):
        corpus.loader("test", rows=1, seed=0)


def two_sources(folder, tmp_path, **weights) -> TextData:
    other = tmp_path / "others"
    other.mkdir(exist_ok=True)
    for number in range(60):
        (other / f"{number}.txt").write_text(text(number + 500, words=30).upper(), "utf-8")
    sources = (FilesSource(path=str(folder), name="low", weight=weights.get("low", 1)),
               FilesSource(path=str(other), name="HIGH", weight=weights.get("high", 1)))
    return TextData(
        sources=sources, dedup=DedupConfig(near=False), split=SplitConfig(fractions=(0.8, 0.1, 0.1))
    )


@pytest.mark.parametrize("pack", ["windows", "best_fit"])
def test_a_weight_says_how_often_a_source_is_seen(folder, tmp_path, pack):
    from dataclasses import replace
    data = replace(two_sources(folder, tmp_path, high=3), pack=pack)
    corpus = prepare(data, BPE, context=64, cache=tmp_path / "cache")
    low, high = corpus.facts["sources"]
    assert high["passes_per_epoch"] == pytest.approx(3 * low["passes_per_epoch"], rel=1e-3)
    loader = corpus.loader("train", rows=1, seed=0)
    upper = 0
    for _ in range(400):
        batch = next(loader)
        seen = corpus.tokenizer.decode(batch["tokens"][0][batch["weight"][0] > 0].numpy())
        assert not ("stone" in seen and "STONE" in seen)        # a row is of one source
        upper += seen.upper() == seen
    assert upper / 400 == pytest.approx(high["share"], abs=0.01)


def test_equal_weights_make_an_epoch_every_token_once(folder, tmp_path):
    corpus = prepare(two_sources(folder, tmp_path), BPE, context=64, cache=tmp_path / "cache")
    assert [source["passes_per_epoch"] for source in corpus.facts["sources"]] == [1, 1]
    assert sum(source["share"] for source in corpus.facts["sources"]) == pytest.approx(1)
    loader = corpus.loader("train", rows=1, seed=0)
    weight = sum(float(next(loader)["weight"].sum()) for _ in range(loader.batches_per_epoch))
    assert weight == corpus.facts["splits"]["train"]["tokens"]


def test_ranks_share_the_sequence(folder, tmp_path):
    corpus = prepare(texts(folder), BPE, context=64, cache=tmp_path / "cache")
    whole = next(corpus.loader("train", rows=4, seed=3))["tokens"]
    parts = [
        next(corpus.loader("train", rows=4, seed=3, rank=rank, world_size=2))["tokens"] for rank in (0, 1)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_too_little_text_for_one_context_is_refused(folder, tmp_path):
    with pytest.raises(
        DataError, match=r"holds [\d,]+ tokens .* fewer than one context of 100,000.*\n.*context of \d+"
    ):
        prepare(texts(folder), BytesConfig(), context=100_000, cache=tmp_path / "cache")


def test_a_setting_without_effect_is_refused(folder):
    with pytest.raises(ConfigError, match="both given"):
        TextData(path=str(folder), sources=(PythonSource(),))
    with pytest.raises(ConfigError, match="no effect"):
        TextData(encoding="gb18030")


def test_sources_are_found_from_the_path(folder):
    assert TextData().resolved_sources() == (PythonSource(),)
    assert TextData(path=str(folder), encoding="gb18030").resolved_sources() == (
        FilesSource(path=str(folder), encoding="gb18030"),)
    (folder / "state.json").write_text("{}")
    assert TextData(path=str(folder)).resolved_sources()[0].kind == "hf"


def test_chinese_in_its_own_encoding(tmp_path):
    for number in range(60):
        (tmp_path / f"{number}.txt").write_bytes((f"第{number}章 斗拱承托屋檐，" * 20).encode("gb18030"))
    corpus = prepare(
        TextData(path=str(tmp_path), encoding="gb18030", dedup=DedupConfig(near=False)),
        BytesConfig(),
        context=64,
        cache=tmp_path / ".cache",
    )
    assert "斗拱承托屋檐" in corpus.documents("train")[0].text


def test_config_survives_json(folder):
    data = two_sources(folder, folder.parent, high=2)
    assert from_dict(TextData, json.loads(json.dumps(to_dict(data)))) == data
    with pytest.raises(ConfigError, match="Did you mean 'files'"):
        from_dict(TextData, {"sources": [{"kind": "file", "path": "x"}]})


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("DOUGONG_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("DOUGONG_CACHE")
    assert default_cache().parts[-2:] == (".cache", "dougong")
