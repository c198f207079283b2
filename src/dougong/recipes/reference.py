"""What the start model thinks of every judged reply, computed once and kept: the reference of DPO, IPO and KTO.

It lies in the cache under the fingerprints of the start's weights and of the data, so a run that is resumed, scored or
repeated with other settings finds it there, and while training no second model is in memory.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dougong.core.config import replace, to_dict
from dougong.core.errors import ConfigError
from dougong.core.files import default_cache, write_bytes
from dougong.data.prepare import key_of, turn
from dougong.objectives.objective import Objective
from dougong.objectives.preference import pair_log_probs
from dougong.recipes.recipe import Recipe
from dougong.recipes.start import Weights, begin, read_weights
from dougong.runtime.device import Runtime

_FORMAT = 1
_TOKENS_AT_ONCE = 16_384
_SHAPES = {"dpo": "pairs", "ipo": "pairs", "orpo": "pairs", "kto": "singles", "reward": "pairs"}


def check_pairs(recipe: Recipe, corpus: Any, objective: Objective, model: nn.Module,
                runtime: Runtime) -> tuple[Objective, Any]:
    """Refuses data that an objective over judged replies cannot read; it needs nothing else."""
    kind = recipe.objective.kind
    if recipe.data.kind != "preferences":
        raise ConfigError(f"objective.kind={kind} learns from judged replies, and data.kind={recipe.data.kind} has "
                          "none.\nTry data.kind=preferences data.path=pairs.jsonl.")
    if corpus.shape != _SHAPES[kind]:
        advice = ("Try data.unpair=true, which takes each pair as a good reply and a bad one." if kind == "kto" else
                  "Try objective.kind=kto.")
        raise ConfigError(f"objective.kind={kind} reads {_SHAPES[kind]}, and {recipe.data.path} holds {corpus.shape}.\n"
                          f"{advice}")
    return objective, corpus


def check_labels(recipe: Recipe, corpus: Any, objective: Objective, model: nn.Module,
                 runtime: Runtime) -> tuple[Objective, Any]:
    """Refuses data without labels, or with others than the model was made for."""
    labels = corpus.facts.get("labels")
    if not labels:
        raise ConfigError(f"objective.kind=classify_text tells labelled texts apart, and data.kind={recipe.data.kind} "
                          "has no labels.\nTry data.kind=labelled data.path=texts.jsonl.")
    if recipe.objective.classes != len(labels):
        raise ConfigError(f"objective.classes={recipe.objective.classes}, and the data have {len(labels)} labels.\n"
                          "Leave it out: it is derived.")
    return objective, corpus


def with_reference(recipe: Recipe, corpus: Any, objective: Objective, model: nn.Module,
                   runtime: Runtime) -> tuple[Objective, Any]:
    """The corpus with the reference beside each reply. Raises ConfigError where there is no model to compare with."""
    check_pairs(recipe, corpus, objective, model, runtime)
    if recipe.start is None:
        raise ConfigError(f"objective.kind={recipe.objective.kind} compares the model with the one that it began from. "
                          "Name one: --model RUN, --model FOLDER, or --model hf:OWNER/NAME. A run that was made "
                          "smaller has none of its shape any more: score it on text, dougong eval RUN --data FOLDER.")
    weights = read_weights(recipe.start)
    path = _place(recipe, corpus, runtime, weights)
    with turn(path.with_suffix(".lock"), lambda *_: None):
        if not path.is_file():
            write_bytes(path, _computed(recipe, corpus, runtime, weights).tobytes())
    return objective, corpus.with_reference(np.frombuffer(path.read_bytes(), np.float32).reshape(-1, 2).copy())


def _place(recipe: Recipe, corpus: Any, runtime: Runtime, weights: Weights) -> Path:
    table = weights.tensors.get("stem.tokens.weight")
    grown = table is not None and len(table) < recipe.model.vocab_size
    key = key_of([_FORMAT, weights.fingerprint, corpus.fingerprint, to_dict(recipe.model), str(runtime.dtype),
                  recipe.seed if grown else None])
    return default_cache() / "reference" / f"{key}.f32"


@torch.no_grad()
def _computed(recipe: Recipe, corpus: Any, runtime: Runtime, weights: Weights) -> np.ndarray:
    """Log-probabilities (N 2, float32, nats) of every judged reply under the start model."""
    from dougong.recipes.assemble import build_model

    start = build_model(replace(recipe, adapt=None), runtime)
    begin(start, weights, seed=recipe.seed)
    start.eval()
    rows = max(1, _TOKENS_AT_ONCE // (2 * recipe.row_tokens))
    found = [pair_log_probs(start, batch.to(runtime.device), recipe.objective.chunk_logits)[0].float().cpu()
             for batch in corpus.all_batches(rows=rows)]
    return torch.cat(found).numpy()
