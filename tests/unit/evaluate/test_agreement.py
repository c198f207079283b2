"""Divergence and agreement against torch's, over the whole logits at once in float64."""

import numpy as np
import pytest
import torch
from tiny_decoders import tiny

from dougong.data.documents import Document
from dougong.data.tokenizer import BytesConfig, Tokenizer
from dougong.evaluate.agreement import agreement

TOKENIZER = BytesConfig().build()
DOCUMENTS = [Document(id=str(i), source="memory", text=text)
             for i, text in enumerate(("a first text", "斗拱", "x" * 70, ""))]


def models():
    return (tiny(vocab_size=TOKENIZER.vocab_size, seed=seed) for seed in (0, 1))


def test_it_is_the_divergence_over_every_token_of_every_window():
    a, b = models()
    found = agreement(a, b, TOKENIZER, DOCUMENTS, context=32)
    expected, same = [], []
    for document in DOCUMENTS:
        ids = [TOKENIZER.document_id, *TOKENIZER.encode(document.text).tolist()]
        for begin in range(0, len(ids) - 1, 32):
            window = torch.tensor([ids[begin:min(begin + 32, len(ids) - 1)]])
            with torch.no_grad():
                p, q = (torch.distributions.Categorical(logits=m(window)[0].double()) for m in (a, b))
            expected += torch.distributions.kl_divergence(p, q).tolist()
            same += (p.logits.argmax(-1) == q.logits.argmax(-1)).tolist()
    assert len(found.divergence) == sum(len(TOKENIZER.encode(d.text)) for d in DOCUMENTS)
    np.testing.assert_allclose(found.divergence, expected, rtol=1e-4, atol=1e-5)
    assert found.payload()["top1_agreement"] == pytest.approx(np.mean(same))
    assert found.payload()["kl_p99"] == pytest.approx(np.percentile(expected, 99), rel=1e-4)


def test_a_document_is_read_after_the_token_that_begins_it():
    a, b = models()
    llamas = Tokenizer(TOKENIZER.backend, document_id=TOKENIZER.document_id, settings={"bos_token": "b"})
    assert llamas.begin_id not in (None, TOKENIZER.document_id)
    found = agreement(a, b, llamas, DOCUMENTS[:1], context=32).divergence
    ids = torch.tensor([[llamas.begin_id, *TOKENIZER.encode(DOCUMENTS[0].text).tolist()][:-1]])
    with torch.no_grad():
        p, q = (torch.distributions.Categorical(logits=m(ids)[0].double()) for m in (a, b))
    np.testing.assert_allclose(found, torch.distributions.kl_divergence(p, q), rtol=1e-4, atol=1e-5)


def test_a_model_agrees_with_itself():
    a, _ = models()
    found = agreement(a, a, TOKENIZER, DOCUMENTS, context=32).payload()
    assert found == {"kl_mean": 0.0, "kl_p99": 0.0, "top1_agreement": 1.0}
