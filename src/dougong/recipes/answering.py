"""Held-out conversations answered: how many checkable answers are right, and what a run changed in the model it began
from. A handful of replies and some hundred losses: little beside the training."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from dougong.data.conversations import Conversation
from dougong.evaluate.skills import same
from dougong.generate import SamplingConfig
from dougong.generate.replies import GREEDY, replies
from dougong.recipes.recipe import Recipe
from dougong.recipes.start import begin, read_weights
from dougong.runtime.device import Runtime

_READ, _CHECKED, _SHOWN, _SCORED = 2000, 200, 8, 400
_CHARACTERS = 2000


def answered(model: nn.Module, corpus: Any, runtime: Runtime, split: str, *,
             poll: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The share of checkable answers of the split that greedy replies match exactly, in all and by skill; of many, 200
    spread over the split. Nothing where none can be checked."""
    chosen = _spread([one for one in _spread(corpus.conversations(split), _READ) if one.answer is not None], _CHECKED)
    if not chosen:
        return {}
    answers = [one.answer or "" for one in chosen]
    said = _say(model, corpus, runtime, chosen, long_enough(corpus.tokenizer, answers), poll)
    right = list(map(same, said, answers))
    skills = {one.skill: [r for r, other in zip(right, chosen) if other.skill == one.skill] for one in chosen}
    return {"exact_match": sum(right) / len(right), "exact_match_items": len(right),
            "exact_match_by_skill": {skill or "none": sum(hits) / len(hits) for skill, hits in sorted(
                skills.items(), key=lambda pair: str(pair[0]))}}


def before_and_after(recipe: Recipe, corpus: Any, model: nn.Module, runtime: Runtime, split: str) -> dict[str, Any]:
    """The fields of a `before_after` event: replies of the start and of this model to the same held-out conversations,
    the reference beside them, and both losses with the paired difference. Puts the start's weights into `model`."""
    from dougong.evaluate.replies import paired_losses, reply_losses

    assert recipe.start is not None
    shown = _of_each_skill(_spread(corpus.conversations(split), _READ), _SHOWN)
    rows = recipe.train.micro_rows or 1

    def measure() -> tuple[Any, list[str], dict[str, Any]]:
        return (reply_losses(model, corpus.batches(split, rows=rows), runtime, most=_SCORED),
                _say(model, corpus, runtime, shown, GREEDY), answered(model, corpus, runtime, split))

    after, said_after, matched_after = measure()
    begin(model, read_weights(recipe.start), seed=recipe.seed)
    before, said_before, matched_before = measure()
    difference, interval = paired_losses(after, before)
    return {"split": split, "start": recipe.start.path,
            "loss": {"before": before.mean, "after": after.mean, "difference": difference, "interval": interval,
                     "conversations": len(after.nats), "tokens": float(after.weight.sum())},
            "exact_match": {"before": matched_before, "after": matched_after} if matched_after else None,
            "replies": [{"id": one.id, "skill": one.skill, "asked": [_cut(m) for m in asked(one)],
                         "reference": one.messages[_last_reply(one)]["content"][:_CHARACTERS],
                         "before": b[:_CHARACTERS], "after": a[:_CHARACTERS]}
                        for one, b, a in zip(shown, said_before, said_after)]}


def long_enough(tokenizer: Any, answers: Sequence[str]) -> SamplingConfig:
    """Greedy replies that have room for each of the answers, and to go on after it."""
    longest = max(len(tokenizer.encode(answer)) for answer in answers)
    return SamplingConfig(temperature=0, max_tokens=longest + 8, long_prompt="truncate")


def _say(model: nn.Module, corpus: Any, runtime: Runtime, chosen: Sequence[Conversation], config: SamplingConfig,
         poll: Callable[[], None] = lambda: None) -> list[str]:
    return replies(model, corpus.tokenizer, [asked(one) for one in chosen], config,
                   tools=[one.tools for one in chosen], runtime=runtime, poll=poll)


def _last_reply(conversation: Conversation) -> int:
    return max(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")


def asked(conversation: Conversation) -> list[dict[str, Any]]:
    """What was said before the last reply."""
    return [{key: value for key, value in message.items() if key != "train"}
            for message in conversation.messages[:_last_reply(conversation)]]


def _cut(message: dict[str, Any]) -> dict[str, str]:
    return {"role": message["role"], "content": message["content"][:_CHARACTERS]}


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly over the whole."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def _of_each_skill(found: Sequence[Conversation], most: int) -> list[Conversation]:
    """In turn one of each skill; without skills, spread."""
    by_skill: dict[str | None, list[Conversation]] = {}
    for one in found:
        by_skill.setdefault(one.skill, []).append(one)
    each = -(-most // max(1, len(by_skill)))
    return [one for skill in by_skill for one in _spread(by_skill[skill], each)][:most] if len(by_skill) > 1 \
        else _spread(found, most)
