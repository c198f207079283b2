"""Shards hold every token of every document once, whatever happened while they were written."""

import numpy as np
import pytest

from dougong.core.errors import DataError
from dougong.data.documents import Document
from dougong.data.pack import Stream, Windows
from dougong.data.shards import TokenStore, write_shards
from dougong.data.tokenizer import BytesConfig, Tokenizer

TOKENIZER = BytesConfig().build()


class View(list):
    """The documents of one split, in memory."""

    @property
    def bytes(self) -> int:
        return sum(len(document.text.encode()) for document in self)


class WideTokenizer:
    """Ids that need more than 16 bits."""

    vocab_size, document_id, first_id = 70_000, 69_999, 69_999

    def encode_batch(self, texts):
        return [np.array([ord(c) + 66_000 for c in text], dtype=np.int32) for text in texts]


def documents(count: int = 40) -> View:
    rng = np.random.default_rng(0)
    return View(
        Document(id=str(i), source="abc"[i * 3 // count], text="中x\n"[i % 3] * int(rng.integers(0, 60)))
        for i in range(count)
    )


def files(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_stream_is_each_document_behind_a_separator(tmp_path):
    view = documents()
    store = write_shards(view, TOKENIZER, tmp_path, shard_bytes=500)
    expected = [np.append(256, TOKENIZER.encode(document.text)) for document in view]
    assert len(store._shards) > 3
    assert np.array_equal(store.read(0, store.tokens), np.concatenate(expected))
    for found, tokens, document in zip(store.documents(), expected, view, strict=True):
        assert np.array_equal(found.tokens, tokens)
        assert (found.bytes, found.source) == (len(document.text.encode()), document.source)
    assert store.dtype == np.uint16
    assert store.per_source()["b"] == {
        "documents": sum(d.source == "b" for d in view),
        "bytes": sum(len(d.text.encode()) for d in view if d.source == "b"),
        "tokens": sum(len(t) for t, d in zip(expected, view) if d.source == "b"),
    }


def test_a_document_begins_with_the_tokenizers_own_first_token_and_ends_with_its_last(tmp_path):
    llamas = Tokenizer(TOKENIZER.backend, document_id=256, settings={"bos_token": "a"})
    store = write_shards(documents(), llamas, tmp_path)
    begin = TOKENIZER.backend.token_to_id("a")
    assert all(document.tokens[0] == begin for document in store.documents())
    rows = Windows(Stream(store, 0, len(store)), 64)
    fields = rows.fields(np.arange(rows.rows), 0)
    counts = fields["weight"] > 0
    assert (fields["tokens"][counts] == begin).sum() == (fields["targets"][counts] == 256).sum() == len(store)
    assert 256 not in fields["tokens"][counts] and begin not in fields["targets"][counts]
    assert llamas.fingerprint != TOKENIZER.fingerprint, "other tokens than those of before are found in the cache"
    plain = Tokenizer(TOKENIZER.backend, document_id=256, settings={"bos_token": None, "add_bos_token": False})
    assert (plain.first_id, plain.fingerprint) == (256, TOKENIZER.fingerprint)


def test_any_stretch_can_be_read_across_shards(tmp_path):
    store = write_shards(documents(), TOKENIZER, tmp_path, shard_bytes=100)
    whole = store.read(0, store.tokens)
    for start, stop in np.sort(np.random.default_rng(1).integers(0, store.tokens + 1, (300, 2))).tolist():
        assert np.array_equal(store.read(start, stop), whole[start:stop])


def test_large_vocabularies_get_32_bits(tmp_path):
    store = write_shards(View([Document(id="0", source="a", text="hi")]), WideTokenizer(), tmp_path)
    assert store.dtype == np.uint32
    assert store.read(0, 3).tolist() == [69_999, 66_104, 66_105]


@pytest.mark.parametrize(("after_bytes", "finished"), [(1, 0), (600, 1), (1500, 2)])
def test_interrupted_work_goes_on_and_ends_with_the_same_files(tmp_path, after_bytes, finished):
    view = documents()
    write_shards(view, TOKENIZER, tmp_path / "whole", shard_bytes=500)

    def interrupt(done, total, what):
        assert total == view.bytes
        if done >= after_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(view, TOKENIZER, tmp_path / "torn", shard_bytes=500, progress=interrupt)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "torn").glob("*.tokens")}
    assert len(kept) == finished
    with pytest.raises(DataError, match="no finished"):
        TokenStore.open(tmp_path / "torn")
    write_shards(view, TOKENIZER, tmp_path / "torn", shard_bytes=500)
    assert files(tmp_path / "torn") == files(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


@pytest.mark.parametrize("name", ["00001.tokens", "00001.documents.npy", "00001.json"])
def test_a_torn_shard_is_made_again(tmp_path, name):
    view = documents()
    write_shards(view, TOKENIZER, tmp_path, shard_bytes=500)
    whole = files(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / name).write_bytes(whole[name][:-3])
    write_shards(view, TOKENIZER, tmp_path, shard_bytes=500)
    assert files(tmp_path) == whole


def test_finished_shards_are_not_made_again(tmp_path):
    write_shards(documents(), TOKENIZER, tmp_path)
    write_shards(documents(), None, tmp_path)   # would need a tokenizer


def test_progress_ends_with_all_bytes(tmp_path):
    seen = []
    write_shards(documents(), TOKENIZER, tmp_path, shard_bytes=300, stage="tokenising",
                 progress=lambda done, total, what: seen.append((done, total, what)))
    assert [done for done, *_ in seen] == sorted(done for done, *_ in seen)
    assert seen[-1] == (documents().bytes, documents().bytes, "tokenising")


def test_a_shard_of_the_wrong_size_is_refused(tmp_path):
    write_shards(documents(), TOKENIZER, tmp_path, shard_bytes=500)
    path = tmp_path / "00001.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"00001\.tokens has .* instead of"):
        TokenStore.open(tmp_path)


def test_an_empty_split_is_an_empty_store(tmp_path):
    store = write_shards(View(), TOKENIZER, tmp_path)
    assert (store.tokens, len(store), list(store.documents()), store.per_source()) == (0, 0, [], {})
