from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

from dougong.core.errors import ConfigError, DataError
from dougong.evaluate import bits_per_byte, token_nats
from dougong.evaluate.bits_per_byte import _score_documents
from dougong.evaluate.together import bits_per_byte_together
from dougong.models.families.qwen3 import Qwen3Config
from dougong.objectives.losses import Losses
from dougong.runtime.device import Runtime

TEXTS = ["the cat", "斗拱 naïve 🏯" * 5, "", "a" * 40, "x", "to be or not to be, that is the question"]


@dataclass
class Doc:
    id: str
    source: str
    text: str


class Bytes:
    vocab_size = 257

    def __init__(self, document_id=256):
        self.document_id = self.first_id = document_id

    def encode(self, text):
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)

    def decode_bytes(self, ids):
        return bytes(int(id) for id in ids if id < 256)


class Bigram(torch.nn.Module):
    """log P(next | this) from a table, so that what a text costs is known in closed form."""

    config = None

    def __init__(self):
        super().__init__()
        self.table = torch.randn(257, 257) * 2
        self.table[:, 256] = 3.0
        self.forwards = 0

    def hidden(self, tokens_BT):
        self.forwards += 1
        return tokens_BT[..., None]

    def head(self, tokens):
        return self.table[tokens[..., 0]]

    def nats(self, ids):
        log = self.table.double().log_softmax(-1)
        return -sum(log[a, b].item() for a, b in pairwise(ids))


def documents(texts=TEXTS):
    return [Doc(f"{i}.txt", "even" if i % 2 == 0 else "odd", text) for i, text in enumerate(texts)]


@pytest.fixture
def qwen3():
    model = Qwen3Config(vocab_size=257, context=32, dim=32, num_layers=2, num_heads=2, num_kv_heads=1).build()
    model.initialise(0)
    return model


@pytest.mark.parametrize("context, stride", [(4, None), (4, 1), (7, 3), (1000, None)])
def test_every_token_is_scored_once_at_its_closed_form_cost(context, stride):
    model = Bigram()
    result = bits_per_byte(model, Bytes(), documents(), context=context, stride=stride)
    expected = [model.nats([256, *text.encode()]) for text in TEXTS]
    assert result.nats == pytest.approx(expected, rel=1e-5)
    assert result.bytes.tolist() == result.tokens.tolist() == [len(text.encode()) for text in TEXTS]
    total = sum(len(text.encode()) for text in TEXTS)
    assert result.bits_per_byte == pytest.approx(sum(expected) / np.log(2) / total, rel=1e-5)
    assert result.nats_per_token == pytest.approx(sum(expected) / total, rel=1e-5)
    assert (result.context, result.stride, result.lossy) == (context, stride or context, 0)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_its_vocabulary():
    model = Bigram()
    model.table.zero_()
    assert bits_per_byte(model, Bytes(), documents(), context=8).bits_per_byte == pytest.approx(np.log2(257))


def test_a_stream_is_scored_across_documents_and_its_first_token_uniformly():
    model = Bigram()
    result = bits_per_byte(model, Bytes(None), documents(), context=5)
    ids = "".join(TEXTS).encode()
    assert result.nats.sum() == pytest.approx(np.log(257) + model.nats(ids), rel=1e-5)
    assert result.nats[0] == pytest.approx(np.log(257) + model.nats(ids[:7]), rel=1e-5)
    assert result.nats[1] == pytest.approx(model.nats(ids[6:7 + len(TEXTS[1].encode())]), rel=1e-5)
    assert result.nats[2] == 0 and result.tokens[2] == 0


class Llamas(Bytes):
    """Begins a text with another token than ends it."""

    def __init__(self):
        super().__init__()
        self.first_id = 0


def test_a_document_is_read_after_the_token_that_begins_it_not_the_one_that_ends_it():
    model = Bigram()
    expected = [model.nats([0, *text.encode()]) for text in TEXTS]
    assert bits_per_byte(model, Llamas(), documents(), context=1000).nats == pytest.approx(expected, rel=1e-5)

    def losses(batch):
        assert all(batch["tokens"][row, 0] == 0 for row in range(len(TEXTS)) if batch["weight"][row].any())
        nats = torch.nn.functional.cross_entropy(model.head(model.hidden(batch["tokens"])).flatten(0, 1),
                                                 batch["targets"].flatten(), reduction="none")
        return Losses({}, {"loss": (nats * batch["weight"].flatten()).sum()})

    together = bits_per_byte_together(losses, Llamas(), documents(), rows=len(TEXTS), context=1000, runtime=Runtime())
    assert together["loss"] * together["tokens"] == pytest.approx(sum(expected), rel=1e-5)


def test_the_result_does_not_depend_on_batches_or_order(qwen3, monkeypatch):
    whole = bits_per_byte(qwen3, Bytes(), documents(), context=16)
    small = bits_per_byte(qwen3, Bytes(), documents(), context=16, batch_tokens=1)
    assert small.nats == pytest.approx(whole.nats, rel=1e-5)
    back = bits_per_byte(qwen3, Bytes(), documents()[::-1], context=16, batch_tokens=50)
    assert back.nats[::-1] == pytest.approx(whole.nats, rel=1e-5)
    monkeypatch.setitem(_score_documents.__globals__, "_GROUP_TOKENS", 20)
    monkeypatch.setitem(_score_documents.__globals__, "_LOGITS_AT_ONCE", 1000)
    parts = bits_per_byte(qwen3, Bytes(), iter(documents()), context=16)
    assert parts.nats == pytest.approx(whole.nats, rel=1e-5)
    low, high = whole.interval()
    assert low < whole.bits_per_byte < high and (low, high) == whole.interval()


def test_windows_read_what_they_say(qwen3):
    ids = np.random.default_rng(0).integers(0, 257, size=40)
    for context, stride in [(8, 8), (8, 3), (16, 1)]:
        [nats] = token_nats(qwen3, [ids], context=context, stride=stride)
        scored = 0
        for begin in range(0, 39, stride):
            end = min(begin + context, 39)
            with torch.no_grad():
                log = qwen3(torch.from_numpy(ids[None, begin:end])).log_softmax(-1)[0]
            for at in range(scored, end):
                assert nats[at] == pytest.approx(-log[at - begin, ids[at + 1]].item(), rel=1e-4)
            scored = max(scored, end)
        assert len(nats) == scored == 39


def test_more_context_changes_a_models_figure_but_not_a_bigrams(qwen3):
    a, b = (bits_per_byte(qwen3, Bytes(), documents(), context=16, stride=s).nats.sum() for s in (16, 4))
    assert abs(a - b) > 1e-3


def test_documents_that_the_tokenizer_cannot_restore_are_counted():
    class Upper(Bytes):
        def encode(self, text):
            return super().encode(text.upper())

    assert bits_per_byte(Bigram(), Upper(), documents(["ABC", "abc", "Abc"]), context=8).lossy == 2


def test_evaluation_leaves_the_model_in_its_mode(qwen3):
    qwen3.train()
    qwen3.stack["0"].eval()
    before = [module.training for module in qwen3.modules()]
    bits_per_byte(qwen3, Bytes(), documents(), context=16)
    assert [module.training for module in qwen3.modules()] == before
    qwen3(torch.zeros(1, 3, dtype=torch.long)).sum().backward()


def test_similar_windows_share_a_forward():
    model = Bigram()
    bits_per_byte(model, Bytes(), documents(["abcd"] * 100), context=4, batch_tokens=200)
    assert model.forwards == 2


@pytest.mark.parametrize("options", [{"context": 64}, {"context": 0}, {"context": 8, "stride": 9},
                                     {"context": 8, "stride": 0}])
def test_impossible_windows_are_refused(qwen3, options):
    with pytest.raises(ConfigError):
        bits_per_byte(qwen3, Bytes(), documents(), **options)


def test_nothing_to_score_is_an_error():
    for texts in ([], ["", ""]):
        with pytest.raises(DataError, match="no text"):
            bits_per_byte(Bigram(), Bytes(), documents(texts), context=8)


def test_a_diverged_model_is_an_error_and_not_a_figure():
    model = Bigram()
    model.table[97] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        bits_per_byte(model, Bytes(), documents(), context=8, runtime=Runtime())
