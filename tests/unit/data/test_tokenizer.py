"""Ids equal Hugging Face's, text comes back byte for byte, no text turns into a special token."""

import importlib.util
import json
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFaceTokenizer
from transformers import AutoTokenizer

from dougong.core.errors import ConfigError, DataError
from dougong.data.bpe import PATTERNS, training_sample
from dougong.data.difficult import difficult_texts
from dougong.data.documents import Document
from dougong.data.encoders import HuggingFaceEncoder
from dougong.data.tokenizer import BpeConfig, BytesConfig, CharactersConfig, FileConfig, Tokenizer

TEXTS = [Path(json.__file__).read_text("utf-8"), Path(re.__file__).read_text("utf-8"),
         "斗拱是中国木构架建筑的特有构件。" * 20 + "Don't stop 123456!\r\n\tnaïve café 👩‍👩‍👧‍👦" * 5]


class View(list):
    """The documents of one split, in memory."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__(Document(id=str(i), source="memory", text=text) for i, text in enumerate(texts))

    @property
    def bytes(self) -> int:
        return sum(len(document.text.encode()) for document in self)


KINDS = {
    "gpt-2": BpeConfig(vocab_size=600, pre_tokenizer="gpt-2"),
    "qwen2": BpeConfig(vocab_size=600),
    "llama-bpe": BpeConfig(vocab_size=600, pre_tokenizer="llama-bpe"),
    "characters": CharactersConfig(),
    "stream": CharactersConfig(separator=False),
    "bytes": BytesConfig(),
    "byte stream": BytesConfig(separator=False),
}
TOKENIZERS = {name: config.build(View(TEXTS)) for name, config in KINDS.items()}
KIND = pytest.mark.parametrize("kind", KINDS)


@KIND
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_comes_back_exactly(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode() and tokenizer.decode(ids) == text
    assert tokenizer.exact and ids.dtype == np.int32


@KIND
def test_transformers_reads_what_was_saved_and_gives_the_same_ids(kind, tmp_path):
    tokenizer = TOKENIZERS[kind]
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, *difficult_texts()]:
        ids = tokenizer.encode(text).tolist()
        assert theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.document_id
    assert len(theirs) == tokenizer.vocab_size


@KIND
def test_loading_gives_the_same_tokenizer(kind, tmp_path):
    tokenizer = TOKENIZERS[kind]
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.facts() == tokenizer.facts() and again.fingerprint == tokenizer.fingerprint
    assert again.kind == KINDS[kind].kind and again.document_id == tokenizer.document_id
    assert again.pre_tokenizer == (kind if kind in PATTERNS else None)
    assert np.array_equal(again.encode(TEXTS[2]), tokenizer.encode(TEXTS[2]))


@KIND
def test_a_fast_encoder_is_used_and_batches_equal_single_texts(kind):
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.facts()["encoder"] == ("tiktoken" if kind in PATTERNS else "numpy")
    texts = [*TEXTS, "", *difficult_texts()]
    for ids, text in zip(tokenizer.encode_batch(texts, threads=2), texts, strict=True):
        assert np.array_equal(ids, tokenizer.encode(text))


@KIND
def test_text_that_looks_like_a_special_token_stays_text(kind):
    tokenizer = TOKENIZERS[kind]
    text = "a<|endoftext|>b<|reserved_0|>c<0x41>"
    ids = tokenizer.encode(text)
    assert not set(ids.tolist()) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == text


def test_document_token_is_left_out_of_decoded_text():
    tokenizer = TOKENIZERS["qwen2"]
    assert tokenizer.decode([tokenizer.document_id, *tokenizer.encode("a"), tokenizer.document_id]) == "a"


@pytest.mark.parametrize("name", PATTERNS)
def test_tiktoken_cuts_every_assigned_code_point_as_hugging_face_does(name):
    tokenizer = TOKENIZERS[name]
    reference = HuggingFaceEncoder(tokenizer.backend)
    points = [
        chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)) not in ("Cs", "Cn", "Co")
    ]
    points = [
        c
        for c in points
        if not 0x3400 < ord(c) < 0x9FFF and not 0xAC00 < ord(c) < 0xD7A0 and ord(c) < 0x20000
    ]
    for start in range(0, len(points), 512):
        text = "".join(f"a{c} {c}1'{c}\n" for c in points[start:start + 512])
        assert np.array_equal(tokenizer.encode(text), reference.encode(text)), points[start:start + 512]


def test_patterns_are_the_published_ones():
    source = importlib.util.find_spec("transformers.models.qwen2.tokenization_qwen2").origin
    assert PATTERNS["qwen2"] in Path(source).read_text("utf-8").replace('"\n    r"', "")
    ours, gpt2 = (
        pre_tokenizers.Split(Regex(PATTERNS["gpt-2"]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    for text in [*TEXTS, *difficult_texts()]:
        assert [span for _, span in ours.pre_tokenize_str(text)] == [
            span for _, span in gpt2.pre_tokenize_str(text)
        ]
    assert PATTERNS["llama-bpe"] == PATTERNS["qwen2"].replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def test_a_million_blanks_are_encoded_all_the_same():
    tokenizer = TOKENIZERS["qwen2"]
    text = " " * 1_000_000 + "x"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_encoder_whose_ids_would_differ_is_not_used():
    """Ids that do not ascend with merge rank, and a token that the text is cut by first."""
    spec = json.loads(TOKENIZERS["qwen2"].backend.to_str())
    vocabulary = spec["model"]["vocab"]
    first, second = ("".join(pair) for pair in spec["model"]["merges"][:2])
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    swapped = HuggingFaceTokenizer.from_str(json.dumps(spec))
    assert Tokenizer(swapped, document_id=None).facts()["encoder"] == "tokenizers"
    added = HuggingFaceTokenizer.from_str(TOKENIZERS["qwen2"].backend.to_str())
    added.add_tokens(["from json"])
    tokenizer = Tokenizer(added, document_id=None)
    assert tokenizer.facts()["encoder"] == "tokenizers"
    assert added.token_to_id("from json") in tokenizer.encode("from json")
    assert tokenizer.decode(tokenizer.encode("from json")) == "from json"


def test_a_fast_encoder_that_failed_on_the_users_text_is_never_used_again(tmp_path, monkeypatch):
    backend = HuggingFaceTokenizer.from_str(TOKENIZERS["qwen2"].backend.to_str())
    monkeypatch.setattr("dougong.data.encoders._PROVEN", {})
    monkeypatch.setattr("dougong.data.encoders.proven_equal", lambda *_: False)
    Tokenizer(backend, document_id=None, proof=TEXTS).save(tmp_path)
    monkeypatch.undo()
    assert Tokenizer.load(tmp_path).facts()["encoder"] == "tokenizers"


def test_one_process_proves_an_encoder_once(tmp_path, monkeypatch):
    monkeypatch.setattr("dougong.data.encoders._PROVEN", {})
    TOKENIZERS["qwen2"].save(tmp_path)
    assert Tokenizer.load(tmp_path).facts()["encoder"] == "tiktoken"
    monkeypatch.setattr("dougong.data.encoders.difficult_texts", lambda: pytest.fail("proven again"))
    assert Tokenizer.load(tmp_path).facts()["encoder"] == "tiktoken"


def test_training_is_deterministic_and_ids_ascend_with_merges():
    again = BpeConfig(vocab_size=600).build(View(TEXTS))
    assert again.fingerprint == TOKENIZERS["qwen2"].fingerprint
    assert again.vocab_size == 600 and again.document_id == 592
    assert list(again.special_tokens) == ["<|endoftext|>", *(f"<|reserved_{n}|>" for n in range(7))]


def test_a_vocabulary_larger_than_the_text_supports_names_the_largest():
    with pytest.raises(ConfigError, match=r"Try tokenizer.vocab_size=(\d+)") as error:
        BpeConfig(vocab_size=50_000).build(View(TEXTS))
    largest = int(re.search(r"Try tokenizer.vocab_size=(\d+)", str(error.value))[1])
    assert BpeConfig(vocab_size=largest).build(View(TEXTS)).vocab_size == largest
    with pytest.raises(ConfigError):
        BpeConfig(vocab_size=largest + 1).build(View(TEXTS))


@pytest.mark.parametrize(
    "section",
    [{"vocab_size": 200}, {"vocab_size": 300, "reserved": 60}, {"sample_bytes": 0}, {"reserved": -1}],
)
def test_impossible_settings_are_refused(section):
    with pytest.raises(ConfigError, match="Try"):
        BpeConfig(**section)


def test_training_sample_is_bounded_deterministic_and_reaches_into_long_documents():
    view = View([f"{number:04d} " * 200 for number in range(100)])
    sample = list(training_sample(view, 20_000, seed=1))
    assert 15_000 < sum(map(len, sample)) <= 20_000
    assert (
        sample == list(training_sample(view, 20_000, seed=1)) != list(training_sample(view, 20_000, seed=2))
    )
    assert len(list(training_sample(view, 10**6, seed=1))) == 100
    novel = View(["".join(f"{n} " for n in range(20_000))])
    slices = list(training_sample(novel, 10_000, seed=1))
    assert sum(map(len, slices)) <= 10_000 and any(
        "19" in part[:6] or "18" in part[:6] for part in slices[-2:]
    )
    with pytest.raises(DataError, match="no text"):
        list(training_sample(View([]), 10, seed=0))


def test_characters_of_one_stream_are_the_tokens():
    text = "To be, or not to be: that is the question."
    tokenizer = CharactersConfig(unknown="refuse", separator=False).build(View([text]))
    assert tokenizer.vocab_size == len(set(text)) and tokenizer.document_id is None
    assert tokenizer.encode(text).tolist() == [sorted(set(text)).index(character) for character in text]


def test_a_character_outside_the_vocabulary_is_refused_or_spelled_in_bytes():
    refuses = CharactersConfig(unknown="refuse").build(View(["abc"]))
    with pytest.raises(DataError, match=r"'é' \(U\+00E9\).*\n.*unknown=bytes"):
        refuses.encode("abé")
    spells = CharactersConfig().build(View(["abc"]))
    first = spells.encode("\x00")[0]
    assert (spells.encode("aé中😀b") - first).tolist()[1:-1] == [*"é中😀".encode()]


def test_existing_tokenizers_of_other_makes(tmp_path):
    """A Unigram model with SentencePiece's blanks, its end-of-text token found by name."""
    backend = HuggingFaceTokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator(
        TEXTS,
        trainers.UnigramTrainer(
            vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
        ),
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileConfig(path=str(tmp_path / "tokenizer.json")).build()
    text = "import the encoder and return it"
    assert (
        tokenizer.encode(text).tolist() == backend.encode(text).ids
        and tokenizer.decode(tokenizer.encode(text)) == text
    )
    assert (
        tokenizer.kind == "file"
        and not tokenizer.exact
        and tokenizer.document_id == backend.token_to_id("</s>")
    )
    assert tokenizer.facts()["encoder"] == "tokenizers"
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").fingerprint == tokenizer.fingerprint


@KIND
def test_pieces_add_up_to_the_text(kind):
    tokenizer = TOKENIZERS[kind]
    text = "Don't stop 123! 斗拱"
    assert b"".join(tokenizer.pieces[id] for id in tokenizer.encode(text)) == text.encode()
    assert all(tokenizer.pieces[id] == name.encode() for name, id in tokenizer.special_tokens.items())


@pytest.mark.parametrize("decoder", [
    decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]),
    decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                       decoders.Strip(" ", 1, 0)])])
def test_pieces_of_sentencepiece_keep_blanks_and_bytes(decoder):
    words = ["<unk>", "</s>", "New", "▁York", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = HuggingFaceTokenizer(models.BPE(vocab={word: id for id, word in enumerate(words)}, merges=[],
                                              byte_fallback=True))
    backend.decoder = decoder
    backend.add_special_tokens(["</s>"])
    backend.add_tokens(["▁<tool>"])
    tokenizer = Tokenizer(backend, document_id=1)
    assert tokenizer.pieces[1:5] == [b"</s>", b"New", b" York", b" "]
    assert tokenizer.pieces[5:261] == [bytes([byte]) for byte in range(256)]
    assert tokenizer.pieces[261] == "▁<tool>".encode()


@pytest.mark.parametrize(("settings", "begins"), [
    ({}, True), ({"bos_token": None}, True), ({"add_bos_token": True}, True), ({"add_bos_token": False}, False),
    ({"bos_token": None, "add_bos_token": False}, False),
    ({"bos_token": "<|endoftext|>", "add_bos_token": False}, True)])
def test_a_text_begins_with_the_document_token_unless_the_settings_say_with_none(settings, begins):
    made = TOKENIZERS["qwen2"]
    tokenizer = Tokenizer(made.backend, document_id=made.document_id, settings=settings)
    assert tokenizer.begin_id == (made.document_id if begins else None)


@pytest.mark.parametrize("settings", ["[]", "null", "{", '{"eos_token": 5}', '{"eos_token": {"content": [1]}}'])
def test_damaged_settings_are_named(tmp_path, settings):
    BytesConfig().build().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(DataError, match=r"tokenizer_config\.json (is damaged|names a token by)"):
        Tokenizer.load(tmp_path)


def test_a_token_outside_the_vocabulary_ends_nothing():
    tokenizer = Tokenizer(BytesConfig(separator=False).build().backend, document_id=None)
    assert all(tokenizer.ending_with(token) is tokenizer for token in (None, -5, tokenizer.vocab_size, 2**40))
    assert tokenizer.ending_with(7).document_id == 7


def test_a_tokenizer_that_cannot_be_used_says_why(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer at .*tokenizer\.json"):
        FileConfig(path=str(tmp_path)).build()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json that can be read"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer\.path"):
        FileConfig().build()
    TOKENIZERS["byte stream"].save(tmp_path)
    with pytest.raises(ConfigError, match="document_token"):
        FileConfig(path=str(tmp_path)).build()
    with pytest.raises(DataError, match="vocab_size"):
        TOKENIZERS["bytes"].decode([9999])
