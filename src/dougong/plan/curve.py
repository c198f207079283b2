"""The user's own curve: loss against size and text, from a few small runs, with an interval.

L = E + (L0 − E) · h / (1 + h) with h = a/N^α + b/D^β: Chinchilla's form while h is small, and never above L0, what a
model pays that knows nothing (log2 of the vocabulary for each token). Runs of minutes stand where the second matters:
there the loss falls faster and faster before it falls slower and slower, which no sum of powers can do (the bounded
form is that of "Practical Scaling Laws", 2026, arXiv:2605.09189, without its term for overfitting).

A handful of short runs cannot determine five numbers, so the exponents have priors around the published ones, wide on
the steep side; where the runs say nothing the priors hold. The posterior is sampled (affine-invariant ensemble, Goodman
& Weare 2010), so what the runs leave open widens the interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dougong.plan.laws import DATA_CONSTRAINED, worth

ALPHA, BETA = (0.4, 0.35), (0.4, 0.35)
"""median of the exponents' priors, and spread of their logarithms. Published, of far larger runs: α 0.34 to 0.35, β
0.28 to 0.37; of runs of seconds to minutes here the curve is steeper (benchmarks/plan_budget.py), so the priors reach
up"""
NOISE = (0.015, 0.4)
"""relative scatter of a run around the curve (seed, batch order, the curve's own misfit): median, and spread of its
logarithm; the runs correct it"""
DRIFT = 0.02
"""relative error of the form itself for each doubling of text, or of size, beyond the runs: our allowance; it widens
the interval"""
_WALKERS, _STEPS, _KEPT = 96, 1500, 750


@dataclass(frozen=True)
class SmallRun:
    """One finished probe run. `loss` is bits per byte of held-out text."""

    parameters: float
    tokens: float
    loss: float


class Curve:
    """Draws from what the runs leave possible. `loss(N, D)` gives one value for each draw."""

    def __init__(self, draws: np.ndarray, centre: tuple[float, float], ceiling: float,
                 runs: Sequence[SmallRun]) -> None:
        self._draws, self._centre, self._ceiling, self.runs = draws, centre, ceiling, list(runs)

    def loss(self, parameters: float, tokens: float, unique: float = np.inf) -> np.ndarray:
        """Expected bits per byte under each draw; text beyond `unique` tokens counts as repeated."""
        used = effective_tokens(tokens, unique)
        return _law(self._draws, np.log(parameters / self._centre[0]), np.log(used / self._centre[1]), self._ceiling)

    def predict(self, parameters: float, tokens: float, unique: float = np.inf, *, confidence: float = 0.95,
                seed: int = 0) -> tuple[float, tuple[float, float]]:
        """Median and interval of what *one run* will reach: what the runs leave open, scatter, and drift."""
        expected = self.loss(parameters, tokens, unique)
        beyond = (max(math.log2(tokens / max(run.tokens for run in self.runs)), 0.0)
                  + max(math.log2(parameters / max(run.parameters for run in self.runs)), 0.0))
        spread = np.hypot(np.exp(self._draws[:, 5]), DRIFT * beyond)
        scatter = np.random.default_rng(seed).standard_normal(len(expected)) * spread
        reached = expected * np.exp(scatter)
        tail = (1 - confidence) / 2
        low, middle, high = np.quantile(reached, [tail, 0.5, 1 - tail])
        return float(middle), (float(low), float(high))

    @property
    def numbers(self) -> dict[str, tuple[float, float, float]]:
        """Median and 95 % interval of E, the exponents and the scatter."""
        columns = {"E": self._draws[:, 0], "alpha": np.exp(self._draws[:, 3]), "beta": np.exp(self._draws[:, 4]),
                   "scatter": np.exp(self._draws[:, 5])}
        return {name: tuple(float(q) for q in np.quantile(column, [0.025, 0.5, 0.975]))
                for name, column in columns.items()}  # type: ignore[misc]


def effective_tokens(tokens: float, unique: float) -> float:
    """What text read more than once is worth, in fresh tokens (Muennighoff et al. 2023, equation 5)."""
    assert DATA_CONSTRAINED.repeats
    return tokens if tokens <= unique else worth(tokens, unique, DATA_CONSTRAINED.repeats)


def fit_curve(runs: Sequence[SmallRun], *, ceiling: float, unique: float = np.inf, seed: int = 0) -> Curve:
    """Samples the posterior of (E, log a, log b, log α, log β, log scatter) given runs of two sizes at least; where all
    have about as many tokens, β stays as the prior has it.

    `ceiling` is L0 in bits per byte; `unique` the tokens of the training text, beyond which it repeats. a and b are the
    two terms at the middle of the runs, so that they hardly depend on the exponents.
    """
    assert len({run.parameters for run in runs}) >= 2, "two sizes are the least that says anything"
    n = np.log([run.parameters for run in runs])
    d = np.log([effective_tokens(run.tokens, unique) for run in runs])
    centre = float(np.exp(n.mean())), float(np.exp(d.mean()))
    losses = np.array([run.loss for run in runs])
    random = np.random.default_rng(seed)
    middles = np.array([0.3 * losses.min(), *(mean for mean, _ in _PRIORS)])
    spreads = np.array([0.1 * losses.min(), *(0.3 * spread for _, spread in _PRIORS)])
    start = middles + spreads * random.standard_normal((_WALKERS, len(middles)))
    start[:, 0] = np.clip(start[:, 0], 0.01 * losses.min(), 0.9 * losses.min())
    draws = _ensemble(_Posterior(n - n.mean(), d - d.mean(), losses, ceiling), start, random)
    return Curve(draws, centre, ceiling, runs)


_PRIORS = ((np.log(0.15), 1.0), (np.log(0.4), 1.0), (np.log(ALPHA[0]), ALPHA[1]), (np.log(BETA[0]), BETA[1]),
           (np.log(NOISE[0]), NOISE[1]))
"""normal, of log a, log b, log α, log β, log scatter; E is anywhere between 0 and the lowest loss seen"""


class _Posterior:
    def __init__(self, n: np.ndarray, d: np.ndarray, losses: np.ndarray, ceiling: float) -> None:
        self.n, self.d, self.log_losses, self.lowest, self.ceiling = n, d, np.log(losses), losses.min(), ceiling

    def __call__(self, points: np.ndarray) -> np.ndarray:
        legal = (points[:, 0] > 0) & (points[:, 0] < self.lowest)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            expected = _law(points[:, None, :], self.n, self.d, self.ceiling)
            errors = (self.log_losses - np.log(expected)) / np.exp(points[:, 5:])
            score = -0.5 * (errors**2).sum(1) - len(self.n) * points[:, 5]
            for column, (mean, spread) in enumerate(_PRIORS, start=1):
                score -= 0.5 * ((points[:, column] - mean) / spread) ** 2
        return np.where(legal, np.nan_to_num(score, nan=-np.inf), -np.inf)


def _law(draws: np.ndarray, n, d, ceiling: float) -> np.ndarray:
    """`n` and `d`: logarithms of size and text, relative to the middle of the runs."""
    E, log_a, log_b, log_alpha, log_beta = (draws[..., i] for i in range(5))
    h = np.exp(log_a - np.exp(log_alpha) * n) + np.exp(log_b - np.exp(log_beta) * d)
    return E + (ceiling - E) * h / (1 + h)


def _ensemble(posterior: _Posterior, points: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Stretch moves of one half of the walkers towards the other, in turn; the second half of the steps is kept."""
    count, size = points.shape
    half, kept, scores = count // 2, [], posterior(points)
    for step in range(_STEPS):
        for first in (0, half):
            mine, others = slice(first, first + half), slice(half - first, count - first)
            z = (random.uniform(size=half) + 1) ** 2 / 2   # stretch, density 1/√z between 1/2 and 2
            partner = points[others][random.integers(half, size=half)]
            proposed = partner + z[:, None] * (points[mine] - partner)
            fresh = posterior(proposed)
            accept = np.log(random.uniform(size=half)) < (size - 1) * np.log(z) + fresh - scores[mine]
            points[mine] = np.where(accept[:, None], proposed, points[mine])
            scores[mine] = np.where(accept, fresh, scores[mine])
        if step >= _STEPS - _KEPT and step % 5 == 0:
            kept.append(points.copy())
    return np.concatenate(kept)
