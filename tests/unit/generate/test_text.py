import pytest
import torch
from tiny_models import build
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from dougong.core.errors import ConfigError
from dougong.data.tokenizer import Tokenizer
from dougong.generate import Engine, SamplingConfig, generate
from dougong.generate.text import Detokenizer, StopStrings

TEXT = "naïve 斗拱 🏯, e\u0301t\u00e9"


class Bytes:
    """A tokenizer of single bytes; id 256 begins a document."""

    document_id, vocab_size = 256, 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(id for id in ids if id < 256).decode("utf-8", "replace")


class Scripted(torch.nn.Module):
    """Writes given tokens: the n-th one is certain where `start + n` tokens have been read."""

    config = None

    def __init__(self, script, start=1, vocabulary=257):
        super().__init__()
        self.script, self.start, self.vocabulary = script, start, vocabulary

    def hidden(self, tokens_BT, cache=None):
        B, T = tokens_BT.shape
        begin = 0 if cache.start_B is None else cache.start_B
        index = cache.length + T - begin - self.start
        cache.update(0, torch.zeros(B, 1, T, 1), torch.zeros(B, 1, T, 1))
        cache.advance(T)
        return (torch.zeros(B, T, 1) + torch.as_tensor(index).view(-1, 1, 1)).long()

    def head(self, index_BD):
        logits = torch.zeros(len(index_BD), self.vocabulary)
        for row, index in zip(logits, index_BD[:, 0].tolist()):
            row[self.script[min(index, len(self.script) - 1)]] = 30.0
        return logits


def scripted(text, end=True, **settings):
    """What is generated, and the pieces streamed, when the model writes `text` (str or bytes)."""
    script = list(text.encode() if isinstance(text, str) else text) + [256] * end
    pieces = []
    [result] = generate(Scripted(script), Bytes(), [""], SamplingConfig(temperature=0, **settings),
                        stream=lambda index, piece: pieces.append(piece))
    assert "".join(pieces) == result.text and "" not in pieces
    return result, pieces


def test_streamed_pieces_are_whole_characters_and_add_up():
    result, pieces = scripted(TEXT)
    assert result.text == TEXT and pieces == list(TEXT)
    assert result.finish_reason == "stop" and result.stop is None and result.tokens == [*TEXT.encode(), 256]


def test_bytes_that_are_no_text_become_replacement_characters():
    broken = b"a\xff\xe6\x96b\xe6\x96"
    result, _ = scripted(broken)
    assert result.text == broken.decode("utf-8", "replace") == "a��b�"


def test_a_character_cut_by_the_length_limit_is_shown_as_such():
    result, _ = scripted("é斗", max_tokens=3)
    assert (result.text, result.finish_reason) == ("é�", "length")


@pytest.mark.parametrize("stops, text, stop", [
    (["斗拱"], "naïve ", "斗拱"), ([" "], "naïve", " "), (["拱 ", "🏯,"], "naïve 斗", "拱 "),
    (["zzz"], TEXT, None), (["naïve 斗拱 🏯, x", "e\u0301"], "naïve 斗拱 🏯, ", "e\u0301")])
def test_stop_strings_cut_exactly(stops, text, stop):
    result, _ = scripted(TEXT, stop=stops)
    assert (result.text, result.stop, result.finish_reason) == (text, stop, "stop")


def test_nothing_is_written_after_a_stop_string():
    result, _ = scripted("one two three", stop=["two"])
    assert bytes(result.tokens) == b"one two"


def test_held_back_text_is_given_at_the_end():
    result, pieces = scripted("ab<e", stop=["<end>"], max_tokens=4)
    assert result.text == "ab<e" and pieces == ["a", "b", "<e"] and result.finish_reason == "length"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(size):
    text = "xaababacabab-ab"
    for stops, cut, stop in [(["abac"], "xaab", "abac"), (["bacab", "abab-"], "xaaba", "bacab"),
                             (["abab", "bab"], "xa", "abab"), (["q"], text, None)]:
        matcher, out, found = StopStrings(stops), "", None
        for at in range(0, len(text), size):
            piece, found = matcher.push(text[at:at + size])
            out += piece
            if found:
                break
        assert (out + matcher.end(), found) == (cut, stop)


def test_detokenizing_a_tokenizer_that_spells_by_neighbours():
    backend = Backend(models.WordLevel({"▁the": 0, "▁cat": 1, "s": 2, "▁": 3, "[UNK]": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    writer = Detokenizer(Tokenizer(backend, document_id=None), [0])
    assert [writer.push(id) for id in (1, 2, 0)] == [" cat", "s", " the"]   # alone, "▁cat" would be "cat"


def test_prompts_begin_with_the_document_token():
    result = generate(Scripted([65, 256], start=3), Bytes(), ["ab"], SamplingConfig(temperature=0))[0]
    assert result.prompt_tokens == 3 and result.text == "A"


def test_an_empty_prompt_needs_a_document_token():
    tokenizer = Bytes()
    tokenizer.document_id = None
    with pytest.raises(ConfigError, match="empty"):
        generate(Scripted([65]), tokenizer, [""])


def test_results_come_in_order_whatever_the_batches():
    model = Engine(build("qwen3"))

    class Letters(Bytes):
        document_id, vocab_size = 0, 60

        def encode(self, text):
            return [ord(c) - 60 for c in text]

        def decode(self, ids):
            return "".join(chr(id + 60) for id in ids)

    prompts = ["AB", "", "ABCDEFG", "XY", "B"]
    config = SamplingConfig(n=3, max_tokens=9, seed=4, logprobs=1)
    pieces = [""] * 15

    def stream(index, piece):
        pieces[index] += piece

    whole = generate(model, Letters(), prompts, config, stream=stream)
    assert [(r.prompt, r.sample) for r in whole] == [(p, j) for p in prompts for j in range(3)]
    assert pieces == [result.text for result in whole]
    assert len({r.text for r in whole}) == 15
    for rows in (1, 2, 7):
        assert [r.text for r in generate(model, Letters(), prompts, config, rows=rows)] == pieces
    assert all(len(r.logprobs) == len(r.alternatives) == len(r.tokens) and r.tokens_per_s > 0 for r in whole)
