"""Calibration against scikit-learn, loops and closed forms."""

import numpy as np
import pytest
import torch

from dougong.evaluate.calibration import BINS, Calibration

N, V = 4000, 7


def drawn(sharpness=1.0):
    """Logits, and targets drawn from softmax(logits / sharpness): with 1 the model is calibrated by construction."""
    logits = torch.randn(N, V) * 2
    return logits, torch.multinomial((logits / sharpness).softmax(-1), 1).squeeze(-1)


def counted(logits, targets, chunk=N):
    found = Calibration()
    for start in range(0, len(logits), chunk):
        found.add(logits[start:start + chunk], targets[start:start + chunk])
    return found


def test_the_brier_score_is_scikit_learns_class_by_class():
    from sklearn.metrics import brier_score_loss

    logits, targets = drawn()
    probability = logits.softmax(-1).double().numpy()
    expected = sum(brier_score_loss((targets == v).numpy().astype(int), probability[:, v]) for v in range(V))
    assert counted(logits, targets).brier == pytest.approx(expected, rel=1e-6)


def test_the_error_is_that_of_scikit_learns_curve_weighted_by_its_bins():
    from sklearn.calibration import calibration_curve

    logits, targets = drawn(2.0)
    top, first = logits.softmax(-1).double().max(-1)
    right = (first == targets).numpy()
    accuracy, confidence = calibration_curve(right, top.numpy(), n_bins=BINS)
    counts = np.histogram(top.numpy(), bins=np.linspace(0, 1, BINS + 1))[0]
    expected = (np.abs(accuracy - confidence) * counts[counts > 0] / N).sum()
    assert counted(logits, targets).error == pytest.approx(expected, rel=1e-6)


def test_the_error_is_the_papers_sum_over_bins():
    logits, targets = drawn(0.5)
    top, first = logits.softmax(-1).max(-1)
    expected = 0.0
    for b in range(BINS):
        inside = (top > b / BINS) & (top <= (b + 1) / BINS)
        if inside.any():
            expected += float(inside.sum() / N * abs((first == targets)[inside].float().mean() - top[inside].mean()))
    assert counted(logits, targets).error == pytest.approx(expected, rel=1e-5)


def test_a_model_that_says_what_is_so_has_no_error_and_a_boastful_one_has():
    honest, boastful = counted(*drawn()), counted(*drawn(3.0))
    assert honest.error < 0.02 < 0.1 < boastful.error
    told = boastful.payload()
    assert told["confidence"] > told["accuracy"] + 0.1 and told["tokens"] == N
    assert sum(row["tokens"] for row in told["bins"]) == N


def test_closed_forms():
    certain = torch.tensor([[50.0, 0, 0], [0, 50.0, 0]])
    assert counted(certain, torch.tensor([0, 1])).payload() | {"bins": None} == {
        "error": pytest.approx(0, abs=1e-6), "brier": pytest.approx(0, abs=1e-6), "confidence": pytest.approx(1),
        "accuracy": 1.0, "tokens": 2, "bins": None}
    assert counted(certain, torch.tensor([2, 2])).brier == pytest.approx(2)
    assert counted(torch.zeros(5, 4), torch.arange(5) % 4).brier == pytest.approx(1 - 1 / 4)     # 4 · 1/16 - 2/4 + 1


def test_chunks_change_nothing():
    logits, targets = drawn(2.0)
    whole, parts = counted(logits, targets), counted(logits, targets, chunk=17)
    np.testing.assert_allclose(parts.count, whole.count)
    assert parts.error == pytest.approx(whole.error, rel=1e-9) and parts.brier == pytest.approx(whole.brier, rel=1e-9)


def test_an_evaluation_counts_every_token_it_scores_and_no_other():
    from types import SimpleNamespace

    from dougong.data.tokenizer import BytesConfig
    from dougong.evaluate import bits_per_byte, calibration
    from dougong.models.families.qwen3 import Qwen3Config

    model = Qwen3Config(vocab_size=257, context=16, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
                        ffn_dim=16).build()
    model.initialise(0)
    documents = [SimpleNamespace(id=str(n), source="s", text="abc " * n) for n in (3, 9, 1)]
    tokenizer, counts = BytesConfig().build(), Calibration()
    scores = bits_per_byte(model, tokenizer, documents, context=16, stride=5, calibration=counts)
    assert counts.tokens == scores.tokens.sum()
    whole = calibration(model, tokenizer, documents, context=16, stride=5)
    assert whole.payload() == counts.payload()
    by_hand = Calibration()
    ids = torch.tensor([tokenizer.document_id, *tokenizer.encode(documents[2].text)])
    with torch.no_grad():
        by_hand.add(model(ids[None, :-1])[0], ids[1:])
    assert calibration(model, tokenizer, documents[2:], context=16).brier == pytest.approx(by_hand.brier, rel=1e-6)
