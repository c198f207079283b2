"""The document store: round trip, reuse, rebuilding after an interruption, facts and errors."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dougong.core.errors import DataError
from dougong.data.dedup import DedupConfig
from dougong.data.documents import Document, DocumentStore
from dougong.data.materialise import materialise, source_fingerprint
from dougong.data.sources import FilesSource, JsonlSource
from dougong.data.split import SplitConfig

OFF = DedupConfig(exact=False, near=False)


def folder_of(path, texts):
    path.mkdir(exist_ok=True)
    for name, text in texts.items():
        (path / name).write_bytes(text.encode())
    return FilesSource(path=str(path))


def story(i):
    words = ["the", "carpenter", "cut", "a", "bracket", "and", "set", "it", "upon", "the", "column"] * 4
    return f"Story {i}: " + " ".join(f"{w}{(i * 7919 + k * 104729) % 9973}" for k, w in enumerate(words))


def everything(store):
    return [document for name in ("train", "validation", "test") for document in store.split(name)]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=50, max_size=60))
def test_any_unicode_comes_back_as_it_was(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("round")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    store = materialise([JsonlSource(path=str(folder / "a.jsonl"))], folder / "store", dedup=OFF,
                        split=SplitConfig(rule="documents", fractions=(1, 0, 0))) if any(
                            text.strip() for text in texts) else None
    if store is not None:
        expected = {f"a.jsonl:{i + 1}": text for i, text in enumerate(texts) if text.strip()}
        assert {document.id: document.text for document in store.split("train")} == expected
        assert store.split("train").bytes == sum(len(text.encode()) for text in expected.values())


def test_a_store_holds_every_document_once_with_facts_that_add_up(tmp_path):
    texts = {f"{i:03}.txt": story(i) for i in range(300)} | {"copy.txt": " " + story(5), "bad.bin": "a\0"}
    texts["near.txt"] = story(7).replace("column", "column", 1) + " Indeed."
    store = materialise([folder_of(tmp_path / "in", texts)], tmp_path / "store")
    documents = everything(store)
    assert sorted(document.text for document in documents) == sorted(story(i) for i in range(300))
    facts = store.facts
    assert facts["documents"] == 300 == sum(part["documents"] for part in facts["splits"].values())
    assert facts["bytes"] == sum(len(document.text.encode()) for document in documents)
    assert facts["read"]["documents"] == 302 and facts["skipped"]["binary"]["count"] == 1
    # "copy" and "near" sort after the numbers, so the originals stay
    assert facts["duplicates"]["exact"]["examples"] == [{"removed": "copy.txt", "kept": "005.txt"}]
    assert facts["duplicates"]["exact"]["bytes"] == len(story(5)) + 1
    (near,) = facts["duplicates"]["near"]["examples"]
    assert (near["removed"], near["kept"]) == ("near.txt", "007.txt") and 0.8 <= near["jaccard"] < 1
    assert facts["split"]["rule"] == "documents"
    assert all(facts["splits"][name]["documents"] >= 3 for name in ("validation", "test"))
    view = store.split("validation")
    assert view[0] == next(iter(view)) and view[-1] == view[len(view) - 1] and view[:2] == [view[0], view[1]]
    assert view.sizes.sum() == view.bytes and isinstance(view[0], Document)
    with pytest.raises(IndexError):
        view[len(view)]
    with pytest.raises(DataError, match="train, validation, test"):
        store.split("valid")
    assert pickle.loads(pickle.dumps(view))[0] == view[0]


def test_shakespeare_is_split_as_nanogpt_splits_it(tmp_path):
    text = "Enter HAMLET — 斗拱.\nTo be, or not to be.\n" * 333
    source = folder_of(tmp_path / "in", {"play.txt": text})
    exact = SplitConfig(fractions=(0.9, 0.1, 0), gap_bytes=0)
    store = materialise([source], tmp_path / "store", split=exact)
    n = len(text)
    assert [d.text for d in store.split("train")] == [text[:int(n * 0.9)]]
    assert [d.text for d in store.split("validation")] == [text[int(n * 0.9):]]
    assert len(store.split("test")) == 0 and store.facts["split"]["rule"] == "tail"
    gap = materialise([source], tmp_path / "gap", split=SplitConfig(), context_bytes=200)
    sentence = gap.facts["split"]["sentence"]
    assert "200 bytes left out" in sentence and "1 document is fewer" in sentence
    lost = len(text.encode()) - gap.facts["bytes"]
    assert 400 <= lost < 408


def test_each_source_is_divided_by_itself(tmp_path):
    many = folder_of(tmp_path / "many", {f"{i}.txt": story(i) for i in range(200)})
    novel = folder_of(tmp_path / "novel", {"novel.txt": "\n".join(story(i) for i in range(1000, 1200))})
    again = FilesSource(path=str(tmp_path / "novel"))
    store = materialise([many, novel, again], tmp_path / "store", dedup=OFF)
    assert store.sources == ["many", "novel", "novel-2"] and store.facts["split"]["rule"] == "mixed"
    assert [source["rule"] for source in store.facts["sources"]] == ["documents", "tail", "tail"]
    for name in ("train", "validation", "test"):
        assert set(store.split(name).source_ids.tolist()) == {0, 1, 2}
        assert {document.source for document in store.split(name)} == {"many", "novel", "novel-2"}


def test_a_store_is_reused_until_something_changes(tmp_path):
    source = folder_of(tmp_path / "in", {f"{i}.txt": story(i) for i in range(150)})
    steps = []
    first = materialise([source], tmp_path / "store", progress=lambda *step: steps.append(step))
    assert steps and steps[-1][0] == steps[-1][1]
    steps.clear()
    again = materialise([source], tmp_path / "store", progress=lambda *step: steps.append(step))
    assert not steps and again.fingerprint == first.fingerprint
    before = source_fingerprint([source])
    (tmp_path / "in" / "new.txt").write_text(story(999))
    assert source_fingerprint([source]) != before
    grown = materialise([source], tmp_path / "store")
    assert grown.facts["documents"] == 151 and grown.fingerprint != first.fingerprint
    assert materialise([source], tmp_path / "store", seed=1).fingerprint != grown.fingerprint
    elsewhere = materialise([source], tmp_path / "elsewhere", seed=1)
    assert elsewhere.fingerprint == DocumentStore.open(tmp_path / "store").fingerprint


def test_an_interrupted_preparation_is_built_anew(tmp_path):
    source = folder_of(tmp_path / "in", {f"{i}.txt": story(i) for i in range(150)})
    whole = materialise([source], tmp_path / "whole")

    def interrupt(done, total, what):
        if what == "near duplicates":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        materialise([source], tmp_path / "store", progress=interrupt)
    with pytest.raises(DataError, match="no finished document store"):
        DocumentStore.open(tmp_path / "store")
    assert materialise([source], tmp_path / "store").fingerprint == whole.fingerprint
    assert not (tmp_path / "store" / "building").exists()


def test_damage_is_found(tmp_path):
    source = folder_of(tmp_path / "in", {f"{i}.txt": story(i) for i in range(150)})
    materialise([source], tmp_path / "store")
    text = tmp_path / "store" / "text.bin"
    text.write_bytes(text.read_bytes()[:-1])
    with pytest.raises(DataError, match="bytes where"):
        DocumentStore.open(tmp_path / "store")


@pytest.mark.parametrize("names", [["a.pdf"], ["b.png", "a (1).DOCX"], ["b.epub", "c.odt"]])
def test_documents_of_programs_are_to_be_converted(tmp_path, names):
    source = folder_of(tmp_path / "in", dict.fromkeys(names, "\0"))
    with pytest.raises(DataError, match=r"pdftotext FILE\.pdf.*pandoc -t plain"):
        materialise([source], tmp_path / "store")


def test_nothing_usable_says_what_was_there(tmp_path):
    source = folder_of(tmp_path / "in", {"a.bin": "x\0", "b.txt": ""})
    what = r"(?s)no usable document.*1 binary: a.bin \(NUL at byte 1\).*1 empty: b.txt"
    with pytest.raises(DataError, match=what):
        materialise([source], tmp_path / "store")
    with pytest.raises(DataError, match="too small"):
        materialise([folder_of(tmp_path / "tiny", {"a.txt": "short"})], tmp_path / "store", context_bytes=100)


def test_half_a_surrogate_pair_is_counted(tmp_path):
    lines = [json.dumps({"text": text}) for text in ("fine text " * 9, "half \ud83d", "whole 😀 " * 9)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    store = materialise([JsonlSource(path=str(tmp_path / "a.jsonl"))], tmp_path / "store", context_bytes=0)
    assert store.facts["skipped"]["lone surrogate"]["examples"] == ["a.jsonl:2 (character 5)"]
    assert store.facts["read"]["documents"] == 2
