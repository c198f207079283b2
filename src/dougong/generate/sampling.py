"""From logits to the next token: penalties, truncations, and draws that depend on the request alone."""

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from dougong.core.config import config
from dougong.core.errors import CheckpointError, ConfigError

NOT_FINITE = ("the model's logits are not finite (NaN or infinity), so there is no next token to choose. Its training "
              "probably diverged; try an earlier checkpoint.")
_EXTREME = 1e20   # a factor beyond it, or below its inverse, changes no choice; in float32 it might be infinite, or 0


@config
class SamplingConfig:
    """How a continuation is chosen. The defaults draw from the model's own distribution.

    Order of application: repetition penalty, frequency and presence penalty, logit bias, temperature, top-k, top-p,
    min-p (that of Hugging Face's `generate`, as far as it has them).
    """

    max_tokens: int = Field(default=256, ge=1)
    """most tokens written per continuation"""
    temperature: float = Field(default=1.0, ge=0)
    """divides the logits; 0 takes the most likely token, the lowest id where several are equally likely"""
    top_k: int | None = Field(default=None, ge=1)
    """keep the k most likely tokens, and those as likely as the k-th"""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """keep the smallest set of most likely tokens that holds this probability (Holtzman et al. 2020)"""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """drop tokens less likely than this fraction of the most likely one (Nguyen et al. 2024)"""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """above 1: makes tokens of the prompt and the text so far less likely (Keskar et al. 2019)"""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """taken from a token's logit for each time that it stands in the text so far, the prompt not counted"""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """taken once from the logit of each token in the text so far, the prompt not counted"""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(id, number): added to the logits of these tokens; -100 all but forbids one, 100 all but forces it"""
    stop: tuple[str, ...] = ()
    """strings that end the text; the one that ends it is not part of it"""
    seed: int = Field(default=0, ge=0)
    """the same prompt and seed give the same text, whatever else is in the batch"""
    n: int = Field(default=1, ge=1)
    """continuations per prompt"""
    logprobs: int | None = Field(default=None, ge=0)
    """record the log-probability of each token and this many most likely alternatives, before any of the
    above
    """
    long_prompt: Literal["error", "truncate"] = "error"
    """a prompt longer than the model's context: refuse it (error), or keep its end (truncate)"""
    at_context_end: Literal["stop", "slide"] = "stop"
    """a full context: end with reason "context" (stop), or read the latest half again and go on (slide)"""

    def __post_init__(self) -> None:
        wrong = [(id, bias) for id, bias in self.logit_bias if id < 0 or not -100 <= bias <= 100]
        if wrong:
            raise ConfigError(f"logit_bias has {wrong[0]}: ids are at least 0, and biases from -100 to 100.")
        if any(not text for text in self.stop):
            raise ConfigError("stop holds an empty string, which every text contains. Leave it out.")
        if self.temperature == 0:
            idle = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
            if idle:
                raise ConfigError(f"{', '.join(idle)} has no effect at temperature=0, which always takes the "
                                  "most likely token. Leave it out, or set a temperature above 0.")
            if self.n > 1:
                raise ConfigError(f"n={self.n} continuations at temperature=0 would all be the same. "
                                  "Set n=1, or a temperature above 0.")

    @property
    def counts(self) -> bool:
        """Whether the choice depends on how often a token has been written."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0


class Draws:
    """One request's uniform numbers in [0, 1): a stream that depends on its seed and on nothing else."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.Generator(np.random.PCG64(seed)).random

    def next(self) -> float:
        return self._random()


def penalise_repetition(logits_BV: Float[Tensor, "B V"], seen_BV: Bool[Tensor, "B V"], penalty: float,
                        ) -> Float[Tensor, "B V"]:
    """Divides positive and multiplies negative logits of seen tokens by `penalty` (CTRL, arXiv:1909.05858,
    §4.1).
    """
    penalty = _bounded(penalty)
    penalised = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, penalised, logits_BV)


def _bounded(factor: float) -> float:
    return min(max(factor, 1 / _EXTREME), _EXTREME)


def truncate(logits_BV: Float[Tensor, "B V"], config: SamplingConfig) -> Float[Tensor, "B V"]:
    """Logits with -inf wherever top-k, top-p or min-p (in this order) exclude a token.

    Each rule finds the least logit it keeps, so tokens of equal logit are kept or dropped together and the
    result does not depend on how a sort breaks ties.
    """
    V = logits_BV.shape[-1]
    ranked, ties_B1 = None, 1
    if config.top_k is not None and config.top_k < V:
        ranked = logits_BV.topk(config.top_k).values
        logits_BV = logits_BV.masked_fill(logits_BV < ranked[:, -1:], -torch.inf)
    if config.top_p is not None and config.top_p < 1:
        if ranked is None:
            ranked = _descending(logits_BV)
        else:
            ties_B1 = (logits_BV >= ranked[:, -1:]).sum(-1, keepdim=True) - ranked.shape[-1] + 1
        logits_BV = logits_BV.masked_fill(logits_BV < _nucleus_floor(ranked, ties_B1, config.top_p), -torch.inf)
    if config.min_p:
        floor = logits_BV.max(-1, keepdim=True).values + math.log(config.min_p)
        logits_BV = logits_BV.masked_fill(logits_BV < floor, -torch.inf)
    return logits_BV


def _descending(logits_BV: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """Sorted values. On a CPU by NumPy, whose vector instructions took 0.2 ms for 16 rows of 8,192 where PyTorch, which
    sorts indices too, took 6.8 (one thread of an EPYC with AVX-512)."""
    if logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32:
        return torch.from_numpy(np.sort(logits_BV.numpy(), axis=-1)).flip(-1)
    return logits_BV.sort(descending=True).values


def _nucleus_floor(ranked_BC: Float[Tensor, "B C"], ties_B1: Int[Tensor, "B 1"] | int, top_p: float,
                   ) -> Float[Tensor, "B 1"]:
    """The least logit of the nucleus: a token stays while those before it hold less than `top_p`. The last of the C
    stands for `ties_B1` tokens."""
    weights = (ranked_BC - ranked_BC[:, :1]).exp_()
    weights[:, -1:] *= ties_B1
    weights = _in_float64(weights)
    sums = weights.cumsum(-1)
    last = (sums.sub_(weights) < top_p * (sums[:, -1:] + weights[:, -1:])).sum(-1, keepdim=True).clamp(min=1) - 1
    return ranked_BC.gather(-1, last.to(ranked_BC.device))


def _in_float64(x: Tensor) -> Tensor:
    """On the CPU where the device, as MPS, has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def adjust(logits_BV: Float[Tensor, "B V"], config: SamplingConfig, seen_BV: Bool[Tensor, "B V"] | None = None,
           counts_BV: Float[Tensor, "B V"] | None = None) -> Float[Tensor, "B V"]:
    """Logits after penalties and bias. `seen_BV`: tokens of prompt or text, for the repetition penalty; `counts_BV`:
    how often each stands in the text so far, for the other two (OpenAI's definition).
    """
    if seen_BV is not None and config.repetition_penalty != 1:
        logits_BV = penalise_repetition(logits_BV, seen_BV, config.repetition_penalty)
    if counts_BV is not None and config.counts:
        logits_BV = logits_BV - config.frequency_penalty * counts_BV - config.presence_penalty * (counts_BV > 0)
    if config.logit_bias:
        known = [(id, bias) for id, bias in config.logit_bias if id < logits_BV.shape[-1]]
        ids, biases = zip(*known) if known else ((), ())
        at = torch.tensor(ids, dtype=torch.long, device=logits_BV.device)
        logits_BV = logits_BV.index_add(-1, at, logits_BV.new_tensor(biases).expand(len(logits_BV), -1))
    return logits_BV


def choose(logits_BV: Float[Tensor, "B V"], config: SamplingConfig, uniforms: list[float] | None = None,
           seen_BV: Bool[Tensor, "B V"] | None = None, counts_BV: Float[Tensor, "B V"] | None = None,
           ) -> Int[Tensor, "B"]:
    """The next token of each row under one config: `adjust`, then `pick`. Raises CheckpointError for NaN logits."""
    logits_BV = adjust(logits_BV.float(), config, seen_BV, counts_BV)
    if not bool(logits_BV.max(-1).values.isfinite().all()):
        raise CheckpointError(NOT_FINITE)
    return pick(logits_BV, config, uniforms)


def pick(logits_BV: Float[Tensor, "B V"], config: SamplingConfig, uniforms: list[float] | None = None,
         ) -> Int[Tensor, "B"]:
    """The most likely token of each row at temperature 0, else the inverse CDF at the row's uniform.

    One uniform per row and token makes a row's draw independent of its neighbours. The CDF is summed in
    float64, as a float32 sum over a large vocabulary would lose its smallest probabilities; each of them is exact
    enough in float32 (to 2^-23 of itself).
    """
    top_B, best_B = logits_BV.max(-1)
    if config.temperature == 0:
        return best_B
    assert uniforms is not None and len(uniforms) == len(logits_BV)
    cdf_BV = _weights(logits_BV - top_B[:, None], config).cumsum_(-1)
    target_B1 = torch.tensor(uniforms, dtype=torch.float64, device=cdf_BV.device)[:, None] * cdf_BV[:, -1:]
    return torch.searchsorted(cdf_BV, target_B1, right=True)[:, 0].to(logits_BV.device)


def _weights(shifted_BV: Float[Tensor, "B V"], config: SamplingConfig) -> Float[Tensor, "B V"]:
    """What each token's probability is proportional to, in float64. `shifted_BV` are logits less their largest: a tiny
    temperature then sends the others to -inf, never the best to +inf.
    """
    return _in_float64(truncate(shifted_BV.div_(_bounded(config.temperature)), config).exp())


def probabilities(logits_BV: Float[Tensor, "B V"], config: SamplingConfig) -> Float[Tensor, "B V"]:
    """The law that `pick` draws from at a temperature above 0, in float64."""
    weights_BV = _weights(logits_BV - logits_BV.max(-1, keepdim=True).values, config)
    return weights_BV / weights_BV.sum(-1, keepdim=True)


def accept(p_V: Float[Tensor, "V"], q_V: Float[Tensor, "V"], guess: int, uniforms: tuple[float, float]) -> int:
    """A draw from p, given a draw from q: the guess with probability min(1, p/q), else a draw from what p has more than
    q (Leviathan et al. 2023, arXiv:2211.17192, algorithm 1). A q that is not finite refuses the guess.
    """
    if uniforms[0] * float(q_V[guess]) < float(p_V[guess]):
        return guess
    cdf_V = (p_V - q_V.nan_to_num()).clamp_(min=0).cumsum_(0)
    if not float(cdf_V[-1]):        # p is q but for rounding
        return guess
    return int(torch.searchsorted(cdf_V, cdf_V[-1] * uniforms[1], right=True))


def log_probabilities(logits_BV: Float[Tensor, "B V"], chosen_B: Int[Tensor, "B"], count: int,
                      ) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Each row's log-probability (nats) of its chosen token, and its `count` most likely (id,
    log-probability).
    """
    log_BV = logits_BV.float().log_softmax(-1)
    of_chosen = log_BV.gather(-1, chosen_B[:, None].long())[:, 0].tolist()
    top = log_BV.topk(min(count, log_BV.shape[-1]))
    ranked = [list(zip(ids, values)) for ids, values in zip(top.indices.tolist(), top.values.tolist())]
    return of_chosen, ranked
