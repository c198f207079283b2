"""Distillation: a student learns from all that a teacher holds possible, not only from what the text said."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dougong.core.config import config
from dougong.core.errors import ConfigError
from dougong.data.batch import Batch
from dougong.models.capture import captured, captured_attention
from dougong.objectives.cross_entropy import LossSettings, through_the_head, token_losses
from dougong.objectives.divergence import DIVERGENCES, Lesson, NextByte, Top, Whole
from dougong.objectives.losses import Losses
from dougong.objectives.objective import at_least_fp32

_LEAST = 1e-30      # of an attention weight, before its logarithm


@config
class OnPolicyConfig:
    """The student learns from what it writes itself (Agarwal et al. 2023, arXiv:2306.13649): the beginning of a row is
    kept, the student continues it, the teacher tells of every token of the continuation how it would have gone on."""

    prompt_tokens: Annotated[int, Field(ge=1)] = 32
    """tokens of the text that each row begins with"""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """share of the rows that the student continues; the others stay text"""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """of the student's sampling"""


@config
class DistilConfig:
    """`hard` × cross-entropy of the text + (1 − `hard`) × T² × divergence from the teacher + what matches parts."""

    kind: Literal["distil"] = "distil"
    teacher: str | None = None
    """a run, a checkpoint in one, a Hugging Face directory, or hf:OWNER/NAME"""
    checkpoint: str = "best"
    """of a run: best, last, or a step"""
    align: Literal["tokens", "bytes"] = "tokens"
    """what both models are compared by: the next token (their tokenizers must be the same), or the next byte at places
    where both have a border between tokens (any two tokenizers)"""
    divergence: Literal["forward", "reverse", "js"] = "forward"
    """KL from the teacher to the student, from the student to the teacher, or Jensen–Shannon"""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """divides the logits of both; the divergence is multiplied by its square, so that gradients keep their size (Hinton
    et al. 2015, section 2)"""
    hard: Annotated[float, Field(ge=0, le=1)] = 0.25
    """weight of the ordinary loss"""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """keep this many of the teacher's likeliest tokens on disk, computed once, and train without it; null: the teacher
    computes at every step"""
    match: dict[str, str] = Field(default_factory=dict)
    """parts of the student whose output follows a part of the teacher, such as {stack.1: stack.3}"""
    match_attention: dict[str, str] = Field(default_factory=dict)
    """attention parts whose weights follow the teacher's, such as {stack.1.attention: stack.3.attention}"""
    match_weight: Annotated[float, Field(gt=0)] = 1.0
    """weight of what `match` and `match_attention` add"""
    on_policy: OnPolicyConfig | None = None
    """learn from what the student writes itself"""
    chunk_logits: Annotated[int, Field(ge=1)] = 1 << 22
    """logits held at once (at least 512 tokens' worth)"""

    def __post_init__(self) -> None:
        stored = self.top_k is not None or self.align == "bytes"
        if stored and (self.match or self.match_attention):
            raise ConfigError("objective.match and match_attention read the teacher at every step, so its answers "
                              "cannot be kept on disk. Leave out top_k and align=bytes, or what is matched.")
        if self.top_k is not None and self.align == "bytes":
            raise ConfigError("objective.top_k counts tokens of a shared vocabulary; align=bytes keeps all 257 next "
                              "bytes. Leave top_k out.")
        if self.on_policy and (stored or self.hard):
            raise ConfigError("objective.on_policy: what the student writes is scored by the teacher as it comes and "
                              "is no text to imitate. Set hard=0 and leave out top_k and align=bytes.")
        if self.hard == 1 and not (self.match or self.match_attention):
            raise ConfigError("objective.hard=1 leaves nothing to the teacher. Use objective.kind=causal_lm instead.")

    def build(self) -> "Distil":
        return Distil(self)


class Distil:
    """The student is a `LanguageModel`; batches are those of `causal_lm`.

    The teacher is at hand (`teacher`, frozen), or its answers stand in the batch: `teacher_ids` (B T k) and
    `teacher_log_p` (B T k+1) for `divergence.Top`, `teacher_bytes` (B T 257) for `divergence.NextByte` with the
    student's `byte_of_V`. Which is given when a run is assembled (`recipes/teacher.py`).

    Metrics: `loss` (nats of the text, comparable with every other recipe's), `accuracy`, `divergence` (nats, at the
    temperature), `agreement` (share of tokens on which both put the same first), and `match`.
    """

    not_additive: str | None = None

    def __init__(self, section: DistilConfig, *, teacher: Any = None, byte_of_V: Tensor | None = None,
                 fingerprint: str | None = None) -> None:
        self.section, self.teacher, self.byte_of_V = section, teacher, byte_of_V
        self.fingerprint = fingerprint
        self._divergence = DIVERGENCES[section.divergence]

    def weight(self, batch: Batch) -> float:
        return float(batch["weight"].double().sum())

    def losses(self, model: Any, batch: Batch) -> Losses:
        section = self.section
        with captured(model, section.match) as outputs, captured_attention(model, section.match_attention) as looks:
            x_BTD = model.hidden(batch["tokens"], segment_BT=batch.get("segment"))
        lesson, theirs, their_looks = self._lesson(batch)
        loss, found = self._through_the_head(model, x_BTD.flatten(0, 1), batch, lesson)
        metrics = dict(zip(("loss", "accuracy", "divergence", "agreement"), found[1:].unbind()))
        if section.match or section.match_attention:
            matched = _outputs_apart(model, section.match, outputs, theirs, batch["weight"]) + _looks_apart(
                section.match_attention, looks, their_looks, batch["weight"])
            loss = loss + section.match_weight * matched.to(loss.dtype)
            metrics["match"] = matched.detach()
        return Losses({"model": loss}, metrics)

    @torch.no_grad()
    def _lesson(self, batch: Batch) -> tuple[Lesson, Mapping[str, Tensor], Mapping[str, Tensor]]:
        """What the teacher says of these tokens, and what its matched parts computed."""
        if "teacher_ids" in batch:
            return Top(batch["teacher_ids"].flatten(0, 1), batch["teacher_log_p"].flatten(0, 1)), {}, {}
        if "teacher_bytes" in batch:
            assert self.byte_of_V is not None, "align=bytes: recipes/teacher.py gives the student's first bytes"
            return NextByte(self.byte_of_V, batch["teacher_bytes"].flatten(0, 1)), {}, {}
        teacher, section = self.teacher, self.section
        assert teacher is not None, "a teacher, or its answers in the batch: recipes/teacher.py gives either"
        with captured(teacher, set(section.match.values())) as theirs, captured_attention(
                teacher, set(section.match_attention.values())) as looks:
            t_ND = teacher.hidden(batch["tokens"], segment_BT=batch.get("segment")).flatten(0, 1)
        return Whole(lambda chunk: teacher.head(t_ND[chunk]), section.temperature), theirs, looks

    def _through_the_head(self, model: Any, x_ND: Tensor, batch: Batch, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """The loss, and sums of (loss, nll, correct, divergence, agreement)."""
        hard, T = self.section.hard, self.section.temperature
        targets_N, weight_N = batch["targets"].flatten(), batch["weight"].flatten()

        def of_chunk(logits_NV: Tensor, chunk: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
            plain, grad = token_losses(logits_NV, targets_N[chunk], weight_N[chunk], LossSettings(),
                                       with_gradient=with_gradient and hard > 0)
            scaled_NV = logits_NV.to(plain.dtype) / T
            with torch.no_grad():
                compared = lesson.compare(scaled_NV, chunk, self._divergence)
            weight = weight_N[chunk].to(plain.dtype)
            nats, agrees = (compared.nats_N * weight).sum(), (compared.agrees_N * weight).sum()
            sums = torch.stack([hard * plain[0] + (1 - hard) * T * T * nats, plain[1], plain[2], nats, agrees])
            if not with_gradient:
                return sums, None
            soft = compared.grad_NV.mul_((weight * ((1 - hard) * T))[:, None])
            return sums, (soft if grad is None else soft.add_(grad.to(soft.dtype), alpha=hard)).to(logits_NV.dtype)

        return through_the_head(model.head, x_ND, model.head_parameters(), of_chunk, sums=5,
                                rows=self.section.chunk_logits // model.config.vocab_size)


COMPANION = "companion"
"""the model's child that holds what only training needs; whoever opens the run leaves it out"""


def projection_name(part: str) -> str:
    """The name in `companion` of what brings a part's output to the teacher's width: names there have no dots."""
    return part.replace(".", "-")


def _outputs_apart(model: nn.Module, pairs: Mapping[str, str], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor],
                   weight_BT: Tensor) -> Tensor:
    """Σ weight · ‖P h − t‖² / ‖t‖² over tokens and pairs: relative, so that layers of any scale weigh alike. P is the
    part's learned projection where the widths differ (Romero et al. 2014, arXiv:1412.6550), else nothing."""
    total = weight_BT.new_zeros((), dtype=torch.promote_types(weight_BT.dtype, torch.float32))
    projections: Any = getattr(model, COMPANION, {})
    for ours_name, theirs_name in pairs.items():
        h, t = ours[ours_name], at_least_fp32(theirs[theirs_name])
        if projection_name(ours_name) in projections:
            h = projections[projection_name(ours_name)](h)
        apart = (h.to(t.dtype) - t).square().sum(-1) / t.square().sum(-1).clamp_min(_LEAST)
        total = total + (apart * weight_BT).sum()
    return total


def _looks_apart(pairs: Mapping[str, str], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor],
                 weight_BT: Tensor) -> Tensor:
    """Σ weight · KL(teacher's weights ‖ student's) over queries and pairs, each the mean over heads, so that models of
    any number of heads can be matched."""
    total = weight_BT.new_zeros((), dtype=torch.promote_types(weight_BT.dtype, torch.float32))
    for ours_name, theirs_name in pairs.items():
        q_BTS, p_BTS = ours[ours_name], theirs[theirs_name].to(ours[ours_name].dtype)
        apart_BT = (torch.xlogy(p_BTS, p_BTS) - p_BTS * q_BTS.clamp_min(_LEAST).log()).sum(-1)
        total = total + (apart_BT * weight_BT).sum()
    return total
