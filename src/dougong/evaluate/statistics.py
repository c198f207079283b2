"""How sure a figure is: bootstrap over documents, paired differences, spread over seeds, intervals of
proportions.

Documents are the units resampled, because tokens of one document are not independent. A percentile bootstrap
over few documents is too narrow (with 10 documents a 95 % interval covers about 90 %); below two there is
none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from dougong.evaluate.scores import NATS_PER_BIT, DocumentScores

_INDICES_AT_ONCE = 1 << 22   # bounds the memory of resampling many documents many times
Interval = tuple[float, float]


def bootstrap_ratio(numerator: np.ndarray, denominator: np.ndarray, *, confidence: float = 0.95,
                    resamples: int = 2000, seed: int = 0) -> Interval | None:
    """Percentile interval of Σ numerator / Σ denominator over resampled rows (Efron & Tibshirani 1993, ch.
    13).

    Rows whose denominator is 0, such as empty documents, are left out. None with fewer than two others, as they say
    nothing of the spread.
    """
    numerator, denominator = numerator[denominator != 0], denominator[denominator != 0]
    if len(numerator) < 2:
        return None
    ratios = np.concatenate([numerator[rows].sum(1) / denominator[rows].sum(1)
                             for rows in _resampled(len(numerator), resamples, seed)])
    return _percentiles(ratios, confidence)


def paired_difference(a: DocumentScores, b: DocumentScores, *, confidence: float = 0.95,
                      resamples: int = 2000, seed: int = 0) -> tuple[float, Interval | None]:
    """Bits per byte of `a` minus those of `b`, with an interval from resampling documents for both alike.

    Pairing removes what makes a document hard for both, so small differences show. Below 0: `a` needs fewer
    bits.
    """
    same = a.ids == b.ids and np.array_equal(a.bytes, b.bytes)
    assert same, f"{a.name} and {b.name} scored different documents"
    difference = a.bits_per_byte - b.bits_per_byte
    return difference, bootstrap_ratio((a.nats - b.nats) / NATS_PER_BIT, a.bytes, confidence=confidence,
                                       resamples=resamples, seed=seed)


def bits_per_byte_interval(scores: DocumentScores, *, confidence: float = 0.95, resamples: int = 2000,
                           seed: int = 0) -> Interval | None:
    return bootstrap_ratio(scores.nats / NATS_PER_BIT, scores.bytes, confidence=confidence,
                           resamples=resamples, seed=seed)


def _resampled(rows: int, resamples: int, seed: int):
    """Index arrays (some resamples, rows), drawn with replacement."""
    random = np.random.default_rng(seed)
    at_once = max(1, _INDICES_AT_ONCE // rows)
    for begin in range(0, resamples, at_once):
        yield random.integers(0, rows, size=(min(at_once, resamples - begin), rows), dtype=np.int32)


def _percentiles(values: np.ndarray, confidence: float) -> Interval:
    tail = 50 * (1 - confidence)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Spread:
    """Results of several seeds: their mean, standard deviation (n - 1) and the Student-t interval of the
    mean.
    """

    values: tuple[float, ...]
    mean: float
    sd: float | None
    interval: Interval | None


def seed_spread(values: Sequence[float], *, confidence: float = 0.95) -> Spread:
    """Summary of one figure over seeds; sd and interval are None for a single seed."""
    array = np.asarray(values, dtype=np.float64)
    mean, n = float(array.mean()), len(array)
    if n < 2:
        return Spread(tuple(array.tolist()), mean, None, None)
    sd = float(array.std(ddof=1))
    half = student_t_quantile(0.5 + confidence / 2, n - 1) * sd / math.sqrt(n)
    return Spread(tuple(array.tolist()), mean, sd, (mean - half, mean + half))


def student_t_quantile(probability: float, degrees: int) -> float:
    """The t below which `probability` (at least 0.5) of Student's distribution lies, by bisection."""
    low, high = 0.0, 1.0
    while student_t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def student_t_cdf(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0 and whole degrees of freedom (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    central = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + central / 2


def wilson_interval(successes: int, trials: int, *, confidence: float = 0.95) -> Interval | None:
    """Interval of a proportion that stays within [0, 1] and is not empty at 0 or 1 (Wilson 1927)."""
    if trials == 0:
        return None
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, scale = successes / trials, 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)
