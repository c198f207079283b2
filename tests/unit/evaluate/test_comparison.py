import json
import lzma
import shutil
import subprocess

import numpy as np
import pytest
import torch
from test_bits_per_byte import Bigram, Bytes, Doc

from dougong.core.errors import DataError
from dougong.evaluate import accuracy, evaluate_split, xz_concatenated, xz_per_document
from dougong.evaluate.compressors import xz_bytes


def corpus(count, seed):
    random = np.random.default_rng(seed)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ate", "斗拱"]
    return [Doc(str(i), "ab"[i % 2], " ".join(random.choice(words, size=random.integers(20, 80))))
            for i in range(count)]


def test_xz_is_what_the_xz_command_makes():
    data = b"".join(d.text.encode() for d in corpus(20, 0))
    assert xz_bytes(data) == len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    if shutil.which("xz"):
        made = subprocess.run(["xz", "-9e", "-c"], input=data, capture_output=True, check=True).stdout
        assert xz_bytes(data) == len(made)


def test_xz_per_document_costs_more_than_one_archive():
    documents = corpus(20, 0)
    alone = xz_per_document(documents)
    assert alone.nats[3] == pytest.approx(8 * np.log(2) * xz_bytes(documents[3].text.encode()))
    assert alone.bits_per_byte > xz_concatenated(documents) > 0


def test_the_payload_is_the_result_event():
    documents = corpus(30, 1)
    heard = []
    comparison = evaluate_split(Bigram(), Bytes(), documents, context=64, training_documents=corpus(100, 2),
                                split="test", progress=heard.append)
    payload = json.loads(json.dumps(comparison.payload(), allow_nan=False))
    assert {"bits_per_byte", "interval", "baselines", "sources"} <= set(payload)
    assert [payload[key] for key in ("split", "context", "stride", "weights")] == ["test", 64, 64, "raw"]
    assert payload["interval"][0] < payload["bits_per_byte"] < payload["interval"][1]
    assert [row["source"] for row in payload["sources"]] == ["a", "b"] and len(heard) == 3
    ngram, xz = payload["baselines"]
    assert "5-gram" in ngram["name"] and "xz" in xz["name"]
    assert ngram["bits_per_byte"] < 1.2 < xz["bits_per_byte"]
    for row in (ngram, xz):
        assert row["difference"] == pytest.approx(payload["bits_per_byte"] - row["bits_per_byte"])
        assert row["interval"][0] < row["difference"] < row["interval"][1]
    assert ngram["interval"][0] > 0   # a random table is worse than a trained 5-gram


def test_without_training_documents_there_is_no_5_gram():
    comparison = evaluate_split(Bigram(), Bytes(), corpus(1, 1), context=64)
    assert [row["name"] for row in comparison.payload()["baselines"]] == ["xz -9 per document"]
    assert comparison.payload()["interval"] is None


def test_accuracy_counts_right_answers_in_evaluation_mode():
    model = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Identity()).train()
    logits, labels = torch.randn(1000, 4), torch.randint(0, 4, (1000,))
    result = accuracy(model, logits, labels, rows=64)
    assert result.accuracy == (logits.argmax(1) == labels).double().mean().item() and model.training
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result.interval()[0] < result.accuracy < result.interval()[1]


def test_accuracy_refuses_nothing_and_nan():
    with pytest.raises(DataError):
        accuracy(torch.nn.Identity(), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    with pytest.raises(DataError, match="finite"):
        accuracy(torch.nn.Identity(), torch.full((2, 3), torch.nan), torch.zeros(2, dtype=torch.long))
