"""The translation itself, the same for every family: a table of names, and what each tensor is made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dougong.core.errors import CheckpointError, ConfigError, did_you_mean


@dataclass(frozen=True)
class Stored:
    """What a stored tensor holds: our tensors of these names, one after another along the outputs."""

    ours: tuple[str, ...]
    transposed: bool = False
    """stored as (inputs, outputs), as GPT-2's Conv1D does"""
    expert: int | None = None
    """the place of this tensor in ours, which stacks the matrices of all experts; places are listed in order"""


@dataclass(frozen=True)
class FamilyMap:
    """One family in Hugging Face's words."""

    architecture: str
    """such as "LlamaForCausalLM" """
    base_prefix: str
    """what a checkpoint of the bare model leaves out, such as "model." """
    config_from_hf: Callable[[Mapping[str, Any]], Any]
    """config.json as a dict -> family config. Raises ConfigError for what the family cannot express"""
    config_to_hf: Callable[[Any], dict[str, Any]]
    """family config -> config.json as a dict, with today's keys and those of transformers 4"""
    names: Callable[[Any], dict[str, Stored]]
    """family config -> stored name -> our names"""
    ignored: tuple[str, ...] = ()
    """ends of names that old checkpoints carry and no model needs"""
    apart: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    """splits what some version of transformers joins"""

    def tensors_from_hf(self, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors as our state dict. Raises CheckpointError naming what is missing, left over or
        misshapen."""
        expected, found = self.names(config), self._normalised(config, tensors)
        missing, extra = [n for n in expected if n not in found], [n for n in found if n not in expected]
        if missing or extra:
            hint = did_you_mean(missing[0], extra) if missing and extra else ""
            raise CheckpointError(
                f"the tensors are not those of {self.architecture} with {config.num_layers} layers: "
                f"missing {missing[:3] or 'none'} ({len(missing)}), left over {extra[:3] or 'none'} "
                f"({len(extra)}).{hint} Check that config.json belongs to these weights.")
        ours: dict[str, Tensor] = {}
        stacks: dict[str, list[Tensor]] = {}
        for name, stored in expected.items():
            tensor = found[name].t() if stored.transposed else found[name]
            if stored.expert is not None:
                stacks.setdefault(stored.ours[0], []).append(tensor)
            else:
                ours |= dict(zip(stored.ours, (part.contiguous() for part in tensor.chunk(len(stored.ours)))))
        return ours | {name: torch.stack(matrices) for name, matrices in stacks.items()}

    def tensors_to_hf(self, config: Any, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state dict as stored tensors; the inverse of `tensors_from_hf`, bit for bit."""
        stored_tensors = {}
        for name, stored in self.names(config).items():
            parts = [ours[part] if stored.expert is None else ours[part][stored.expert] for part in stored.ours]
            tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
            stored_tensors[name] = (tensor.t() if stored.transposed else tensor).contiguous()
        return stored_tensors

    def _normalised(self, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in self.apart(tensors).items():
            if not name.startswith((self.base_prefix, "lm_head.")):
                name = self.base_prefix + name
            if not name.endswith(self.ignored or ("\0",)):
                found[name] = tensor
        if config.tied and "lm_head.weight" in found:
            head, embedding = found.pop("lm_head.weight"), self._embedding(config, found)
            if embedding is not None and not torch.equal(head, embedding):
                raise CheckpointError("config.json says tie_word_embeddings, but lm_head.weight differs from "
                                      "the token embedding. Set tie_word_embeddings to false to keep both.")
        return found

    def _embedding(self, config: Any, found: Mapping[str, Tensor]) -> Tensor | None:
        name = next(n for n, stored in self.names(config).items() if stored.ours == ("stem.tokens.weight",))
        return found.get(name)


def refuse(given: Mapping[str, Any], key: str, fits: tuple[Any, ...], default: Any) -> None:
    """Raises ConfigError if config.json's `key` (or its default) is not one of `fits`."""
    value = given.get(key, default)
    if value not in fits:
        known = " or ".join(map(repr, fits))
        raise ConfigError(f"config.json has {key}={value!r}; this family knows {known}. Such a model"
                          " cannot be imported without changing what it computes.")


def rope_theta(given: Mapping[str, Any]) -> float:
    """The rotary base, from today's `rope_parameters` or from transformers 4's `rope_theta` and
    `rope_scaling`.

    Raises ConfigError for stretched forms (linear, dynamic, yarn, llama3).
    """
    rope = dict(given.get("rope_scaling") or {}) | dict(given.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"config.json asks for rotary positions {rope!r}; only the plain form (rope_type "
                          "'default', over the whole head) is known here.")
    theta = rope.get("rope_theta", given.get("rope_theta", 10_000.0))
    return float(10_000.0 if theta is None else theta)


def rope_keys(theta: float) -> dict[str, Any]:
    """The rotary base under both generations of keys."""
    return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def linear(theirs: str, ours: str, *, bias: bool) -> dict[str, Stored]:
    """The entries of one matrix, and of its bias where it has one."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{theirs}.{kind}": Stored((f"{ours}.{kind}",)) for kind in kinds}
