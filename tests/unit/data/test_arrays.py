"""Array data: fixed splits, the loader's order over epochs, processes and restarts, the closed form."""

import numpy as np
import pytest
import torch

from dougong.core.config import from_dict
from dougong.core.errors import ConfigError, DataError
from dougong.data import DATA
from dougong.data.arrays import DigitsData, RegressionData, minimum_norm


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return DigitsData().prepare()


def take(loader, count):
    return [next(loader) for _ in range(count)]


def same(a, b):
    return all(torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x)


def test_digits_are_scaled_complete_and_stratified(digits):
    from sklearn.datasets import load_digits
    splits = [digits.arrays(split) for split in ("train", "validation", "test")]
    pixels = np.concatenate([split["pixels"] for split in splits])
    labels = np.concatenate([split["labels"] for split in splits])
    original, original_labels = load_digits(return_X_y=True)
    rows = {(tuple(image), label) for image, label in zip(original, original_labels)}
    assert {(tuple(p.reshape(64) * 16), label) for p, label in zip(pixels, labels)} == rows
    assert len(pixels) == 1797 and pixels.shape[1:] == (1, 8, 8) and pixels.dtype == np.float32
    assert pixels.min() == 0 and pixels.max() == 1
    for split, share in zip(splits, (0.7, 0.1, 0.2)):
        counts = np.bincount(split["labels"], minlength=10)
        assert np.abs(counts - share * np.bincount(original_labels)).max() <= 1
    assert DigitsData().prepare().fingerprint == digits.fingerprint
    assert digits.facts["splits"]["train"]["rows"] == len(splits[0]["labels"])


def test_an_epoch_shows_every_row_once(digits):
    loader = digits.loader("validation", rows=1, seed=3)
    seen = [batch["pixels"].numpy().tobytes() for batch in take(loader, loader.batches_per_epoch)]
    assert sorted(seen) == sorted(row.tobytes() for row in digits.arrays("validation")["pixels"])
    later = [batch["pixels"].numpy().tobytes() for batch in take(loader, loader.batches_per_epoch)]
    assert later != seen and sorted(later) == sorted(seen) and loader.epoch == 1
    batch = next(digits.loader("train", rows=32, seed=0))
    assert batch["pixels"].shape == (32, 1, 8, 8) and batch["labels"].dtype == torch.int64


def test_restored_equals_uninterrupted(digits):
    whole = digits.loader("validation", rows=50, seed=1)
    for stop in (0, 1, 3, 4, 7):
        whole = digits.loader("validation", rows=50, seed=1)
        take(whole, stop)
        other = digits.loader("validation", rows=50, seed=1)
        other.load_state_dict(whole.state_dict())
        assert same(take(whole, 7), take(other, 7))
    with pytest.raises(DataError, match="seed was 1"):
        digits.loader("validation", rows=50, seed=2).load_state_dict(whole.state_dict())
    with pytest.raises(DataError, match="fingerprint"):
        RegressionData().prepare().loader("train", rows=8, seed=1).load_state_dict(whole.state_dict())


def test_processes_share_one_order(digits):
    whole = take(digits.loader("train", rows=48, seed=5), 60)
    parts = [take(digits.loader("train", rows=48, seed=5, rank=rank, world_size=3), 60) for rank in range(3)]
    for batch, *shares in zip(whole, *parts):
        assert torch.equal(batch["pixels"], torch.cat([share["pixels"] for share in shares]))


def test_rows_that_do_not_fit_are_explained(digits):
    for wrong in ({"rows": 10_000}, {"rows": 0}, {"rows": 50, "world_size": 3}):
        with pytest.raises(ConfigError, match="Try"):
            digits.loader("train", seed=0, **wrong)
    with pytest.raises(DataError, match="Known: train"):
        digits.arrays("valid")


def test_gradient_descent_from_zero_finds_the_minimum_norm_solution():
    data = from_dict(DATA["regression"], {"rows": 10, "features": 40, "precision": "float64"})
    corpus = data.prepare()
    x, y = corpus.arrays("train")["features"], corpus.arrays("train")["targets"]
    solution = minimum_norm(x, y)
    assert x.dtype == np.float64 and corpus.facts["under_determined"]
    assert solution == pytest.approx(np.linalg.pinv(x) @ y, abs=1e-12)
    weights = np.zeros((40, 1))
    for _ in range(4000):
        weights -= 0.02 * x.T @ (x @ weights - y)
    assert np.linalg.norm(weights - solution) < 1e-9 * np.linalg.norm(solution)


def test_a_problem_is_one_and_the_same_and_its_targets_are_linear():
    data = RegressionData(rows=200, features=20)
    corpus = data.prepare()
    assert corpus.fingerprint == data.prepare().fingerprint != RegressionData(rows=200, features=20, problem=1
                                                                              ).prepare().fingerprint
    train, test = corpus.arrays("train"), corpus.arrays("test")
    weights = minimum_norm(train["features"], train["targets"])
    assert np.abs(test["features"] @ weights - test["targets"]).max() < 1e-4
    assert test["targets"].std() == pytest.approx(1, abs=0.5) and train["features"].dtype == np.float32
    noisy = RegressionData(rows=4000, features=5, noise=0.5).prepare().arrays("train")
    residual = noisy["targets"] - noisy["features"] @ minimum_norm(noisy["features"], noisy["targets"])
    assert residual.std() == pytest.approx(0.5, rel=0.05)
