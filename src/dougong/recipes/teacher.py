"""The teacher of a recipe that distils: opened, checked against the student, at hand or with its answers on disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dougong.adapt.on_policy import OnPolicyCorpus
from dougong.adapt.teacher_cache import (
    CachePlan,
    first_bytes,
    plan_answers,
    predict_seconds,
    with_answers,
    write_answers,
)
from dougong.core.config import replace
from dougong.core.errors import ConfigError
from dougong.core.files import default_cache
from dougong.data.tokenizer import Tokenizer
from dougong.interop.hub import is_hub_name
from dougong.models.capture import captured
from dougong.nn.linear import Linear
from dougong.objectives.causal_lm import CausalLMConfig
from dougong.objectives.distil import COMPANION, Distil, DistilConfig, projection_name
from dougong.objectives.objective import Objective
from dougong.recipes.derive import Derived
from dougong.recipes.recipe import Recipe, StartConfig, with_values
from dougong.recipes.start import as_it_was, fingerprint, shape_of_start
from dougong.runtime import seeds
from dougong.runtime.device import Runtime
from dougong.train.shadow import tracked


def with_teacher(recipe: Recipe) -> tuple[Recipe, list[Derived]]:
    """The recipe with its teacher's place spelled out, and its tokenizer where the recipe names none. Reads no weights.
    Raises ConfigError for a recipe that distils and names no teacher."""
    if not isinstance(recipe.objective, DistilConfig):
        return recipe, []
    section = recipe.objective
    if section.teacher is None:
        raise ConfigError(f"recipe {recipe.name} learns from a model that exists. Name one: objective.teacher=RUN, "
                          "objective.teacher=FOLDER, or objective.teacher=hf:OWNER/NAME.")
    if not is_hub_name(section.teacher):
        section = replace(section, teacher=str(Path(section.teacher).expanduser().absolute()))
    recipe, derived = replace(recipe, objective=section), []
    if recipe.tokenizer is None:
        _, tokenizer = shape_of_start(StartConfig(path=str(section.teacher), checkpoint=section.checkpoint))
        recipe = replace(recipe, tokenizer=tokenizer)
        derived.append(Derived("tokenizer", tokenizer.path, "the teacher's"))
        if getattr(recipe.model, "vocab_size", 0) is None:
            tokens = tokenizer.build().vocab_size
            recipe = with_values(recipe, {"model.vocab_size": tokens})
            derived.append(Derived("model.vocab_size", tokens, "the teacher's tokenizer"))
    return recipe, derived


def student_alone(recipe: Recipe) -> Any:
    """The objective that a count or a plan of the student may run without its teacher: as large, of the text alone."""
    if isinstance(recipe.objective, DistilConfig):
        return CausalLMConfig(chunk_logits=recipe.objective.chunk_logits)
    return recipe.objective


@dataclass(frozen=True)
class Teacher:
    """A frozen model that can be asked."""

    model: Any
    tokenizer: Tokenizer
    context: int
    fingerprint: str


def open_teacher(section: DistilConfig, runtime: Runtime) -> Teacher:
    """Opens the teacher in the student's precision and place. Raises what `open_run` raises, and ConfigError for a
    model without language."""
    from dougong.recipes.open_run import open_run

    assert section.teacher is not None, "`resolve` refuses a recipe without one"
    with as_it_was():
        opened = open_run(section.teacher, checkpoint=section.checkpoint)
    if opened.tokenizer is None:
        raise ConfigError(f"{section.teacher} holds no language model (model.kind={opened.recipe.model.kind}), so it "
                          "has nothing to teach one.")
    model: Any = opened.model.to(runtime.device).requires_grad_(False).eval()
    model.compute_dtype = runtime.dtype
    return Teacher(model, opened.tokenizer, opened.recipe.model.context, fingerprint(tracked(model)))


def taught(recipe: Recipe, corpus: Any, objective: Objective, model: Any,
           runtime: Runtime) -> tuple[Objective, Any]:
    """The objective with its teacher, or the corpus with the teacher's answers; on policy, a corpus of what the student
    writes. Raises ConfigError where teacher and student do not fit."""
    section: DistilConfig = recipe.objective
    teacher = open_teacher(section, runtime)
    check_tokenizers(section, teacher, corpus.tokenizer)
    plan = answers_of(recipe, teacher, corpus)
    if plan is not None:
        write_answers(plan, teacher.model, runtime)      # found again where it was written before
        bytes_of_tokens = first_bytes(corpus.tokenizer, model.config.vocab_size).to(runtime.device) \
            if section.align == "bytes" else None
        return (Distil(section, byte_of_V=bytes_of_tokens, fingerprint=teacher.fingerprint),
                with_answers(corpus, plan))
    if recipe.row_tokens > teacher.context:
        raise ConfigError(f"the student's rows have {recipe.row_tokens} tokens, and the teacher {section.teacher} "
                          f"reads {teacher.context}.\nTry model.context={teacher.context}, or objective.top_k=64: the "
                          "teacher then reads windows of its own.")
    if section.match or section.match_attention:
        if runtime.compile:
            raise ConfigError("objective.match reads parts of the model, which compiled blocks do not show. "
                              "Set runtime.compile=false.")
        if section.match_attention and recipe.train.gradient_checkpointing:
            raise ConfigError("objective.match_attention keeps attention weights, which train.gradient_checkpointing "
                              "would compute a second time without them. Leave one of the two out.")
        _attach_projections(model, teacher.model, section, seed=recipe.seed)
    if section.on_policy:
        corpus = OnPolicyCorpus(corpus, model, section.on_policy, runtime)
    return Distil(section, teacher=teacher.model, fingerprint=teacher.fingerprint), corpus


def infer_once(recipe: Recipe, corpus: Any, runtime: Runtime, *, progress: Any = None) -> None:
    """Writes the teacher's answers before anything is assembled, where the recipe keeps them on disk; otherwise
    nothing. `progress` hears first how many bytes they will take."""
    if keeps_answers(recipe):
        plan, teacher = _plan_with_teacher(recipe, corpus, runtime)
        write_answers(plan, teacher.model, runtime, progress=progress)


def predict_answers(recipe: Recipe, corpus: Any, runtime: Runtime) -> dict[str, float]:
    """What asking the teacher once would take: bytes on disk, and seconds here. Nothing is written."""
    plan, teacher = _plan_with_teacher(recipe, corpus, runtime)
    return {"teacher_answers_bytes": plan.bytes, "teacher_seconds": predict_seconds(plan, teacher.model, runtime)}


def keeps_answers(recipe: Recipe) -> bool:
    """Whether the recipe's teacher is asked once, before the training."""
    section = recipe.objective
    return isinstance(section, DistilConfig) and (section.top_k is not None or section.align == "bytes")


def _plan_with_teacher(recipe: Recipe, corpus: Any, runtime: Runtime) -> tuple[CachePlan, Teacher]:
    teacher = open_teacher(recipe.objective, runtime)
    check_tokenizers(recipe.objective, teacher, corpus.tokenizer)
    plan = answers_of(recipe, teacher, corpus)
    assert plan is not None, "asked only where answers are kept"
    return plan, teacher


def answers_of(recipe: Recipe, teacher: Teacher, corpus: Any) -> CachePlan | None:
    """What of the teacher is kept on disk, and where; None where it answers at every step. Its windows are two rows
    long where it reads that much, so that half of one holds all that the student may see."""
    section = recipe.objective
    if not keeps_answers(recipe):
        return None
    if not hasattr(corpus, "tokens") or not hasattr(corpus, "with_fields"):
        raise ConfigError("the teacher's answers are kept for each place of a text; these data are no text. Leave "
                          "objective.top_k out.")
    return plan_answers(corpus, context=min(teacher.context, 2 * recipe.row_tokens), tokenizer=teacher.tokenizer,
                        fingerprint=teacher.fingerprint, temperature=section.temperature, top_k=section.top_k,
                        precision=str(teacher.model.compute_dtype), root=default_cache() / "teachers")


def check_tokenizers(section: DistilConfig, teacher: Teacher, tokenizer: Tokenizer) -> None:
    """Raises ConfigError where student and teacher cannot be compared by what `align` says."""
    ours, theirs = tokenizer, teacher.tokenizer
    if section.align == "tokens" and ours.fingerprint != theirs.fingerprint:
        raise ConfigError(f"student and teacher cut text into different tokens: {_named(ours)} here, {_named(theirs)} "
                          f"in {section.teacher}.\nLeave the tokenizer out to take the teacher's (tokenizer=null), or "
                          "compare next bytes where both have a border: objective.align=bytes.")
    if section.align == "bytes":
        for whose, one in (("the student's", ours), ("the teacher's", theirs)):
            if not one.exact or one.document_id is None:
                raise ConfigError(f"objective.align=bytes needs to know the bytes of every token and where documents "
                                  f"end, and {whose} tokenizer ({_named(one)}) changes text or marks no ends.\nTry "
                                  "tokenizer.kind=bpe, or the teacher's tokenizer with align=tokens.")


def _named(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.kind} of {tokenizer.vocab_size:,} tokens ({tokenizer.fingerprint[:8]})"


def _attach_projections(model: Any, teacher: Any, section: DistilConfig, *, seed: int) -> None:
    """Gives the model the projections that `match` needs, as its child `companion`: trained and saved with it, left out
    wherever the run is opened."""
    device = next(model.parameters()).device
    two = torch.zeros(1, 2, dtype=torch.long, device=device)
    with torch.no_grad(), captured(model, section.match) as ours, captured(teacher, section.match.values()) as theirs:
        model.hidden(two)
        teacher.hidden(two)
    widths = {name: (ours[name].shape[-1], theirs[other].shape[-1]) for name, other in section.match.items()}
    needed = {name: pair for name, pair in widths.items() if pair[0] != pair[1]}
    if not needed:
        return
    projections = nn.ModuleDict()
    for name, (wide, wanted) in needed.items():
        one = Linear(wide, wanted).to(device, next(model.parameters()).dtype)
        own = torch.Generator().manual_seed(seeds.derive(seed, COMPANION, name))
        with torch.no_grad():
            one.weight.copy_(torch.randn(wanted, wide, generator=own) * wide ** -0.5)
        projections[projection_name(name)] = one
    setattr(model, COMPANION, projections)
