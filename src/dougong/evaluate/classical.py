"""What a classifier must beat: a random forest and a linear support vector machine on the same training rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from dougong.core.errors import MissingExtraError
from dougong.evaluate.statistics import Interval, bootstrap_ratio


@dataclass(frozen=True)
class Rival:
    """A baseline's right and wrong answers, (N,), on the same examples as the model's."""

    name: str
    correct: np.ndarray

    def against(self, correct: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
        """An entry of a result's `baselines`: `difference` is the model's accuracy minus this one's, with its paired
        95 % interval over examples (above 0: the model is better)."""
        difference, interval = paired_accuracy(correct, self.correct, seed=seed)
        return {"name": self.name, "accuracy": float(self.correct.mean()), "difference": difference,
                "interval": None if interval is None else list(interval)}


def classical_rivals(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], *,
                     seed: int = 0) -> list[Rival]:
    """Fits both on `train` (inputs (N …), labels (N,)) and answers `test`. Inputs are used as they are, flattened.

    scikit-learn's defaults but for the linear machine's C, where 1 would let it fit pixels in [0, 1] too tightly.
    Raises MissingExtraError without scikit-learn.
    """
    try:
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.svm import LinearSVC
    except ImportError:
        raise MissingExtraError("scikit-learn", "vision", "comparing with a random forest and a linear SVM") from None
    inputs, labels = train[0].reshape(len(train[0]), -1), train[1]
    asked, truth = test[0].reshape(len(test[0]), -1), test[1]
    return [Rival(name, np.equal(made.fit(inputs, labels).predict(asked), truth))
            for name, made in (("random forest", RandomForestClassifier(random_state=seed)),
                               ("linear SVM", LinearSVC(C=0.1, max_iter=10_000, random_state=seed)))]


def paired_accuracy(a: np.ndarray, b: np.ndarray, *, seed: int = 0) -> tuple[float, Interval | None]:
    """Accuracy of `a` minus that of `b`, both (N,) right or wrong on the same examples, with the interval from
    resampling examples for both alike."""
    assert a.shape == b.shape, f"{a.shape} and {b.shape}: answers to different examples"
    difference = a.astype(np.float64) - b.astype(np.float64)
    return float(difference.mean()), bootstrap_ratio(difference, np.ones(len(a)), seed=seed)
