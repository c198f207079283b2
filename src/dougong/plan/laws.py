"""Published laws of scale: how much model and text a budget buys, and with which batch and rate.

Every number that comes from a law carries the law's source and the range it was fitted in, and says where it was used
outside that range. Conventions: N counts the weights that multiply every token (`models.count`'s `matrices`), D tokens,
C = 6·N·D floating-point operations, loss nats per token *of the law's own text and tokenizer*: it orders choices, and
is no promise about other text.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

PETAFLOP_DAY = 8.64e19


@dataclass(frozen=True)
class Range:
    """What a law was fitted on: `what` between `low` and `high`."""

    what: str
    low: float
    high: float

    def judge(self, value: float) -> str:
        """Empty inside the range, else how far outside it, in words."""
        if self.low <= value <= self.high:
            return ""
        side, times = ("below", self.low / max(value, 1e-300)) if value < self.low else ("above", value / self.high)
        return f"{self.what} {amount(value)} is {times:,.1f} times {side} the fitted {self}"

    def __str__(self) -> str:
        return f"{amount(self.low)} to {amount(self.high)}"


@dataclass(frozen=True)
class Figure:
    """One number of a plan: where it comes from, where its law was fitted, and whether it lies outside."""

    name: str
    value: float
    source: str
    fitted: str = ""
    extrapolated: tuple[str, ...] = ()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "extrapolated": list(self.extrapolated)}


def amount(value: float) -> str:
    """A count in four characters or so: 2.1M, 40B, 9.2e20."""
    if value >= 1e15 or (value and value < 1e-2):
        return f"{value:.1e}".replace("e+", "e")
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class LossLaw:
    """L(N, D) = E + A/N^α + B/D^β (Hoffmann et al. 2022, equation 2), where text may be used again.

    Used again, text counts less and less: D tokens of which U are unique are worth U + U·R*·(1 − e^(−(D/U − 1)/R*))
    (Muennighoff et al. 2023, equations 5 and 6), and weights that such a text cannot fill count less in the same way.
    """

    name: str
    source: str
    E: float
    A: float
    B: float
    alpha: float
    beta: float
    ranges: tuple[Range, ...]
    repeats: float | None = None
    """R*_D; None: no text is used twice"""
    excess: float | None = None
    """R*_N"""

    @property
    def balance(self) -> float:
        """G of Hoffmann et al., equation 4."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def loss(self, parameters: float, tokens: float, unique: float = math.inf) -> float:
        """Nats per token of the law's own text."""
        if tokens > unique:
            assert self.repeats and self.excess, f"{self.name} knows no repeated text"
            fillable = min(parameters, self.balance * (unique * self.balance) ** (self.beta / self.alpha))
            parameters = worth(parameters, fillable, self.excess)
            tokens = worth(tokens, unique, self.repeats)
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def optimum(self, flops: float) -> tuple[float, float]:
        """N and D of the least loss for C = 6·N·D with fresh text (equation 4)."""
        parameters = self.balance * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return parameters, flops / 6 / parameters

    def outside(self, parameters: float, tokens: float) -> tuple[str, ...]:
        """Which of size, text and compute lie outside what the law was fitted on."""
        return judge(self.ranges, parameters=parameters, tokens=tokens, FLOPs=6 * parameters * tokens)


def worth(used: float, unique: float, half_life: float) -> float:
    """What `used` counts when only `unique` of it is new: all of it at first, at most (1 + half_life) · unique."""
    again = max(used / unique - 1, 0.0)
    return min(used, unique) + unique * half_life * -math.expm1(-again / half_life)


def judge(ranges: tuple[Range, ...], **values: float) -> tuple[str, ...]:
    return tuple(said for one in ranges if one.what in values and (said := one.judge(values[one.what])))


def fitted(ranges: tuple[Range, ...]) -> str:
    return "; ".join(f"{one.what} {one}" for one in ranges)


CHINCHILLA = LossLaw(
    "Chinchilla, refitted", "Hoffmann et al. 2022 (arXiv:2203.15556), approach 3 as corrected by Besiroglu et al. 2024 "
    "(arXiv:2404.10102)", E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658,
    ranges=(Range("parameters", 70e6, 16e9), Range("tokens", 5e9, 500e9), Range("FLOPs", 6e18, 3e21)))

DATA_CONSTRAINED = LossLaw(
    "data-constrained", "Muennighoff et al. 2023 (arXiv:2305.16264), coefficients of the published fit on C4",
    E=math.exp(0.6254804), A=math.exp(6.255414), B=math.exp(7.3049974), alpha=0.3526596, beta=0.3526596,
    ranges=(Range("parameters", 7e6, 9e9), Range("tokens", 100e6, 900e9)), repeats=15.387756, excess=5.309743)


@dataclass(frozen=True)
class Allocation:
    """A law that says only how to divide compute: N = factor · C^exponent, and D from C = 6·N·D."""

    name: str
    source: str
    factor: float
    exponent: float
    ranges: tuple[Range, ...]
    counts: str = "matrices"
    note: str = ""

    def optimum(self, flops: float) -> tuple[float, float]:
        parameters = self.factor * flops**self.exponent
        return parameters, flops / 6 / parameters

    def outside(self, parameters: float, tokens: float) -> tuple[str, ...]:
        return judge(self.ranges, parameters=parameters, tokens=tokens, FLOPs=6 * parameters * tokens)


NANOCHAT_TOKENS_PER_PARAMETER = 12
NANOCHAT = Allocation(
    "nanochat's ratio", "nanochat, scripts/base_train.py: 12 tokens per weight of matrices and head (10.5 in its own "
    "sweep, runs/scaling_laws.sh)", (6 * NANOCHAT_TOKENS_PER_PARAMETER) ** -0.5, 0.5, (Range("FLOPs", 1e18, 1e19),))
KAPLAN = Allocation(
    "Kaplan", "Kaplan et al. 2020 (arXiv:2001.08361), section 6.1: 1.3e9 · (petaFLOP-days)^0.73",
    1.3e9 / PETAFLOP_DAY**0.73, 0.73, (Range("parameters", 768, 1.5e9), Range("tokens", 22e6, 23e9)),
    "without embeddings", "superseded: its runs did not decay the rate to their own end (Hoffmann et al., section 2)")
DEEPSEEK = Allocation(
    "DeepSeek", "DeepSeek-AI 2024 (arXiv:2401.02954), section 3.2: non-embedding FLOPs per token 0.1715 · C^0.5243",
    0.1715 / 6, 0.5243, (Range("FLOPs", 1e17, 3e20),), "FLOPs per token / 6")

MINUTES_TOKENS_PER_PARAMETER, _MINUTES_FLOPS = 4.0, 1e14
_TOWARDS_NANOCHAT = math.log(NANOCHAT_TOKENS_PER_PARAMETER / MINUTES_TOKENS_PER_PARAMETER) / math.log(1e18 / 1e14)


def small_scale(flops: float) -> LossLaw:
    """What orders shapes below the laws: the form for repeated text, balanced for fewer tokens per parameter.

    Four in runs of minutes on a CPU (few passes over little text: a larger model learns more from each token; what
    `dougong demo` uses), nanochat's twelve from 1e18 FLOPs on, in between by the logarithm. Its loss means nothing.
    """
    ratio = MINUTES_TOKENS_PER_PARAMETER * max(flops / _MINUTES_FLOPS, 1.0) ** _TOWARDS_NANOCHAT
    ratio = min(ratio, float(NANOCHAT_TOKENS_PER_PARAMETER))
    source = (f"{ratio:.1f} tokens per parameter: 4 in runs of minutes on a CPU (as in dougong demo), 12 from 1e18 "
              "FLOPs on (nanochat), in between by the logarithm; repeated text as in Muennighoff et al. 2023 "
              "(arXiv:2305.16264)")
    return replace(DATA_CONSTRAINED, name="a rule for small runs", source=source, ranges=CHINCHILLA.ranges,
                   B=DATA_CONSTRAINED.A * ratio**DATA_CONSTRAINED.alpha)


OTHER_ALLOCATIONS = (NANOCHAT, DEEPSEEK, KAPLAN)


@dataclass(frozen=True)
class Prior:
    """A law of batch or rate: factor · N^of_parameters · D^of_tokens · C^of_flops."""

    name: str
    source: str
    factor: float
    of_parameters: float = 0.0
    of_tokens: float = 0.0
    of_flops: float = 0.0
    ranges: tuple[Range, ...] = field(default_factory=tuple)
    note: str = ""

    def figure(self, parameters: float, tokens: float) -> Figure:
        flops = 6 * parameters * tokens
        value = self.factor * parameters**self.of_parameters * tokens**self.of_tokens * flops**self.of_flops
        outside = judge(self.ranges, parameters=parameters, tokens=tokens, FLOPs=flops)
        return Figure(self.name, value, self.source, fitted(self.ranges), outside, self.note)


_STEP = "Step Law, Li et al. 2025 (arXiv:2503.04715)"
_STEP_RANGES = (Range("parameters", 60e6, 1.1e9), Range("tokens", 2e9, 100e9))
_DEEPSEEK = "DeepSeek-AI 2024 (arXiv:2401.02954), equation 1"
_DEEPSEEK_RANGES = (Range("FLOPs", 1e17, 2e19),)
_LADDER = "OLMo's ladder (OLMo-core)"
_LADDER_RANGES = (Range("parameters", 190e6, 1.3e9),)
_NOTE = "a prior for AdamW, right to a factor of about two"

BATCH_LAWS = (
    Prior("batch (tokens), Step Law", _STEP, 0.58, of_tokens=0.571, ranges=_STEP_RANGES, note=_NOTE),
    Prior("batch (tokens), DeepSeek", _DEEPSEEK, 0.2920, of_flops=0.3271, ranges=_DEEPSEEK_RANGES, note=_NOTE),
    Prior("batch (tokens), OLMo", _LADDER, 327_680 * 108e6 ** (-2 / 3), of_parameters=2 / 3, ranges=_LADDER_RANGES,
          note=_NOTE))
RATE_LAWS = (
    Prior("rate, Step Law", _STEP, 1.79, of_parameters=-0.713, of_tokens=0.307, ranges=_STEP_RANGES, note=_NOTE),
    Prior("rate, DeepSeek", _DEEPSEEK, 0.3118, of_flops=-0.125, ranges=_DEEPSEEK_RANGES, note=_NOTE),
    Prior("rate, OLMo", _LADDER, 0.00235 * 108e6 ** (1 / 3), of_parameters=-1 / 3, ranges=_LADDER_RANGES, note=_NOTE))
