"""Tokens that a text does not need go; text is still cut and spelled as it should be."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import processors

from dougong.core.errors import ConfigError
from dougong.data.difficult import difficult_texts
from dougong.data.documents import Document
from dougong.data.tokenizer import BpeConfig, BytesConfig, Tokenizer
from dougong.data.trim import token_counts, trim

TEXT = Path(json.__file__).read_text("utf-8") + "斗拱是中国木构架建筑的特有构件。" * 20
OTHER = Path(re.__file__).read_text("utf-8")


class View(list):
    @property
    def bytes(self):
        return sum(len(document.text.encode()) for document in self)


TOKENIZER = BpeConfig(vocab_size=900).build(View([Document(id="0", source="memory", text=TEXT + OTHER)]))
TRIMMED = trim(TOKENIZER, token_counts(TOKENIZER, [TOKENIZER.encode(TEXT)]))


def test_the_text_is_cut_exactly_as_before():
    before, after = TOKENIZER.encode(TEXT), TRIMMED.tokenizer.encode(TEXT)
    assert TRIMMED.tokenizer.vocab_size == len(TRIMMED.kept) < TOKENIZER.vocab_size
    assert np.array_equal(TRIMMED.kept[after], before)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_comes_back_exactly(text):
    assert TRIMMED.tokenizer.decode(TRIMMED.tokenizer.encode(text)) == text


def test_difficult_texts_and_other_texts_come_back_exactly():
    for text in [*difficult_texts(), OTHER]:
        assert TRIMMED.tokenizer.decode_bytes(TRIMMED.tokenizer.encode(text)) == text.encode()


def test_each_token_keeps_its_bytes_and_special_tokens_their_names():
    for new, old in enumerate(TRIMMED.kept):
        assert TRIMMED.tokenizer.decode_bytes([new]) == TOKENIZER.decode_bytes([int(old)])
    assert list(TRIMMED.tokenizer.special_tokens) == list(TOKENIZER.special_tokens)
    assert TRIMMED.kept[TRIMMED.tokenizer.document_id] == TOKENIZER.document_id


def test_it_is_saved_and_read_as_any_other_and_keeps_its_fast_encoder(tmp_path):
    TRIMMED.tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == TRIMMED.tokenizer.fingerprint
    assert again.facts()["encoder"] == TOKENIZER.facts()["encoder"] == "tiktoken"
    assert np.array_equal(again.encode(OTHER), HuggingFaceTokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(
        OTHER, add_special_tokens=False).ids)


def test_rare_tokens_go_too_when_asked():
    counts = token_counts(TOKENIZER, [TOKENIZER.encode(TEXT)])
    fewer = trim(TOKENIZER, counts, least=10)
    assert len(fewer.kept) < len(TRIMMED.kept)
    assert fewer.tokenizer.decode(fewer.tokenizer.encode(TEXT)) == TEXT


def test_templates_of_special_tokens_follow_the_new_ids():
    backend = HuggingFaceTokenizer.from_str(TOKENIZER.backend.to_str())
    name = next(iter(TOKENIZER.special_tokens))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", special_tokens=[(name, TOKENIZER.special_tokens[name])])
    wrapped = Tokenizer(backend, document_id=TOKENIZER.document_id)
    found = trim(wrapped, token_counts(wrapped, [wrapped.encode(TEXT)])).tokenizer
    assert found.backend.encode("a").ids[0] == found.special_tokens[name]


def test_a_tokenizer_that_is_no_bpe_is_refused():
    tokenizer = BytesConfig().build()
    with pytest.raises(ConfigError, match="cannot be trimmed"):
        trim(tokenizer, np.ones(tokenizer.vocab_size, np.int64))
