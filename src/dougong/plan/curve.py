"""The user's own curve: loss against size and text, from a few small runs, with an interval.

The form is Chinchilla's, L = E + A/N^α + B/D^β. A handful of short runs cannot determine five numbers, so the published
exponents enter as priors with a wide spread: where the runs say nothing they hold, where the runs speak they give way.
The posterior is sampled (affine-invariant ensemble, Goodman & Weare 2010), so what the runs leave open widens the interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dougong.plan.laws import DATA_CONSTRAINED

ALPHA, BETA = (0.35, 0.10), (0.37, 0.10)
"""mean and spread of the exponents' priors: Besiroglu et al. 2024 0.348 and 0.366, Muennighoff et al. 2023 0.353 both,
Hoffmann et al. 2022 0.34 and 0.28; the spread is ours, wider than theirs, because these runs are smaller"""
NOISE = (0.01, 0.5)
"""a run's own relative scatter (seed, batch order, rounding of shapes): 1 %, to a factor e^0.5; runs correct it"""
_WALKERS, _STEPS, _KEPT = 96, 1200, 600


@dataclass(frozen=True)
class SmallRun:
    """One finished probe run. `loss` is bits per byte of held-out text."""

    parameters: float
    tokens: float
    loss: float


class Curve:
    """Draws from what the runs leave possible. `loss(N, D)` gives one value for each draw."""

    def __init__(self, draws: np.ndarray, centre: tuple[float, float], runs: Sequence[SmallRun]) -> None:
        self._draws, self._centre, self.runs = draws, centre, list(runs)

    def loss(self, parameters: float, tokens: float, unique: float = np.inf) -> np.ndarray:
        """Expected bits per byte under each draw; text beyond `unique` tokens counts as repeated."""
        used = effective_tokens(tokens, unique)
        return _law(self._draws, parameters / self._centre[0], used / self._centre[1])

    def predict(self, parameters: float, tokens: float, unique: float = np.inf, *, confidence: float = 0.95,
                seed: int = 0) -> tuple[float, tuple[float, float]]:
        """Median and interval of what *one run* will reach: the curve's uncertainty and a run's own scatter together."""
        expected = self.loss(parameters, tokens, unique)
        scatter = np.random.default_rng(seed).standard_normal(len(expected)) * np.exp(self._draws[:, 5])
        reached = expected * np.exp(scatter)
        tail = (1 - confidence) / 2
        low, middle, high = np.quantile(reached, [tail, 0.5, 1 - tail])
        return float(middle), (float(low), float(high))

    @property
    def numbers(self) -> dict[str, tuple[float, float, float]]:
        """Median and 95 % interval of E, the exponents and the scatter."""
        columns = {"E": self._draws[:, 0], "alpha": self._draws[:, 3], "beta": self._draws[:, 4],
                   "scatter": np.exp(self._draws[:, 5])}
        return {name: tuple(float(q) for q in np.quantile(column, [0.025, 0.5, 0.975]))
                for name, column in columns.items()}  # type: ignore[misc]


def effective_tokens(tokens: float, unique: float) -> float:
    """What text read more than once is worth, in fresh tokens (Muennighoff et al. 2023, equation 5)."""
    from dougong.plan.laws import worth

    assert DATA_CONSTRAINED.repeats
    return tokens if tokens <= unique else worth(tokens, unique, DATA_CONSTRAINED.repeats)


def fit_curve(runs: Sequence[SmallRun], *, unique: float = np.inf, seed: int = 0) -> Curve:
    """Samples the posterior of (E, log A, log B, α, β, log scatter) given at least three runs.

    A and B are the two terms at the middle of the runs, so that they hardly depend on the exponents.
    """
    assert len(runs) >= 3, "two sizes and two lengths are the least that says anything"
    n = np.log([run.parameters for run in runs])
    d = np.log([effective_tokens(run.tokens, unique) for run in runs])
    centre = float(np.exp(n.mean())), float(np.exp(d.mean()))
    losses = np.array([run.loss for run in runs])
    posterior = _Posterior(n - n.mean(), d - d.mean(), losses)
    random = np.random.default_rng(seed)
    start = np.stack([random.uniform(0.2, 0.7, _WALKERS) * losses.min(),
                      np.log(losses.mean() * 0.2) + 0.3 * random.standard_normal(_WALKERS),
                      np.log(losses.mean() * 0.3) + 0.3 * random.standard_normal(_WALKERS),
                      ALPHA[0] + 0.03 * random.standard_normal(_WALKERS),
                      BETA[0] + 0.03 * random.standard_normal(_WALKERS),
                      np.log(NOISE[0]) + 0.2 * random.standard_normal(_WALKERS)], axis=1)
    return Curve(_ensemble(posterior, start, random), centre, runs)


class _Posterior:
    def __init__(self, n: np.ndarray, d: np.ndarray, losses: np.ndarray) -> None:
        self.n, self.d, self.log_losses, self.lowest, self.mean = n, d, np.log(losses), losses.min(), losses.mean()

    def __call__(self, points: np.ndarray) -> np.ndarray:
        E, log_a, log_b, alpha, beta, log_noise = points.T
        legal = (E > 0) & (E < self.lowest) & (alpha > 0.02) & (beta > 0.02)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            expected = _law(points[:, None, :], np.exp(self.n)[None], np.exp(self.d)[None])
            errors = (self.log_losses - np.log(expected)) / np.exp(log_noise)[:, None]
            likelihood = -0.5 * (errors**2).sum(1) - len(self.n) * log_noise
            prior = (_normal(alpha, *ALPHA) + _normal(beta, *BETA) + _normal(log_noise, np.log(NOISE[0]), NOISE[1])
                     + _normal(log_a, np.log(0.2 * self.mean), 1.0) + _normal(log_b, np.log(0.3 * self.mean), 1.0))
        return np.where(legal, np.nan_to_num(likelihood + prior, nan=-np.inf), -np.inf)


def _normal(value: np.ndarray, mean: float, spread: float) -> np.ndarray:
    return -0.5 * ((value - mean) / spread) ** 2


def _law(draws: np.ndarray, parameters, tokens) -> np.ndarray:
    E, log_a, log_b, alpha, beta = (draws[..., i] for i in range(5))
    return E + np.exp(log_a - alpha * np.log(parameters)) + np.exp(log_b - beta * np.log(tokens))


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
