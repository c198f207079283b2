"""Tokens to text: what is told of tokens belongs to the text that was given."""

import random

import pytest

from dougong.data.tokenizer import BytesConfig
from dougong.generate.engine import Token
from dougong.serve.writing import Writer

TOKENIZER = BytesConfig().build()
END = TOKENIZER.document_id


def write(text, stops=(), end="length", **more):
    writer = Writer(TOKENIZER, [END], stops, hidden=frozenset({END}), **more)
    ids = [*text.encode(), *([END] if end == "stop" else [])]
    pieces = []
    for i, id in enumerate(ids):
        pieces.append(writer.write(Token(0, id, end if i == len(ids) - 1 else None, -float(i), [])))
        if writer.finish:
            break
    return writer, pieces


@pytest.mark.parametrize("text", ["hello", "斗拱 🏯", "e\u0301", "a"])
@pytest.mark.parametrize("end", ["length", "stop"])
def test_pieces_add_up_and_every_token_is_told_once(text, end):
    writer, pieces = write(text, end=end)
    assert "".join(piece.text for piece in pieces) == writer.text == text
    told = [token for piece in pieces for token in piece.tokens]
    assert [token.id for token in told] == list(text.encode())   # the end is no part of it
    assert [token.logprob for token in told] == [-float(i) for i in range(len(told))]
    assert writer.count == len(text.encode()) + (end == "stop") and pieces[-1].finish == end
    so_far = 0
    for piece in pieces:   # tokens come with the text that they begin in, or before it
        assert all(token.start <= so_far + len(piece.text) for token in piece.tokens)
        so_far += len(piece.text)


def test_a_stop_string_cuts_text_and_tokens():
    writer, pieces = write("one STOP two", ["STOP"])
    assert writer.text == "one " and pieces[-1].stop == "STOP" and pieces[-1].finish == "stop"
    assert bytes(token.id for piece in pieces for token in piece.tokens) == b"one "
    assert all(not piece.text.startswith("S") for piece in pieces)


def test_what_may_become_a_stop_string_is_held_back_and_given_at_the_end():
    writer, pieces = write("oneST", ["STOP"])
    assert writer.text == "oneST" and pieces[-1].text == "ST" and len(pieces[-1].tokens) == 2


def test_half_a_character_at_the_end():
    writer = Writer(TOKENIZER, [END])
    writer.write(Token(0, "斗".encode()[0]))
    assert writer.close("time").text == "\ufffd" and writer.finish == "time"


def test_blanks_before_a_reply():
    assert write("  \n hi there", strip=True)[0].text == "hi there"
    assert write("   ", strip=True)[0].text == ""


def test_random_texts_and_stops():
    rng = random.Random(3)
    for _ in range(300):
        text = "".join(rng.choice("ab斗 ") for _ in range(rng.randint(1, 12)))
        stops = ["".join(rng.choice("ab斗") for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(0, 2))]
        writer, pieces = write(text, stops)
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        expected = text[:min(ends)[1]] if ends else text
        assert writer.text == expected == "".join(piece.text for piece in pieces)
        assert bytes(token.id for piece in pieces for token in piece.tokens) == expected.encode()
