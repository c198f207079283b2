"""A reward model as a reward: a run that was trained with `objective.kind=reward` gives a number for each reply."""

from collections.abc import Sequence
from typing import Any

import torch

from dougong.adapt.rewards import Reply, Reward
from dougong.core.errors import ConfigError
from dougong.data.preferences import plain_ids
from dougong.data.turns import template_for_training
from dougong.objectives.reward import last_scores
from dougong.recipes.start import as_it_was

_ROWS_AT_ONCE = 32


class ModelReward:
    """The value head's number for each reply, read where the reply ends."""

    def __init__(self, opened: Any) -> None:
        self._model, self._runtime, self._tokenizer = opened.model, opened.runtime, opened.tokenizer
        as_text = getattr(opened.recipe.data, "spelling", "chat") == "text"
        self._template = None if as_text else template_for_training(opened.tokenizer)
        self._context = opened.recipe.model.context

    @torch.no_grad()
    def __call__(self, replies: Sequence[Reply]) -> list[float | str]:
        found: list[float | str] = []
        for start in range(0, len(replies), _ROWS_AT_ONCE):
            rows = [self._ids(reply) for reply in replies[start:start + _ROWS_AT_ONCE]]
            tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
            for row, ids in zip(tokens, rows):
                row[:len(ids)] = torch.tensor(ids)
            places = torch.tensor([len(ids) - 1 for ids in rows])
            device = self._runtime.device
            found += last_scores(self._model, tokens.to(device), places.to(device))[:, 0].tolist()
        return found

    def _ids(self, reply: Reply) -> list[int]:
        """Prompt and reply by the reward model's own tokenizer, spelled as it learned them; of one too long the end."""
        asked, words = list(reply.task.prompt), [int(id) for id in self._tokenizer.encode(reply.text)]
        prompt = plain_ids(self._tokenizer, asked, first=True) if self._template is None else \
            self._template.encode(asked, tools=reply.task.tools)
        return [*prompt, *words][-self._context:]


def model_reward(path: str) -> Reward:
    """Opens the run at `path`. Raises ConfigError where it is no reward model."""
    from dougong.recipes.open_run import open_run

    with as_it_was():
        opened = open_run(path, to_read=True)
    if getattr(opened.recipe.objective, "value_outputs", None) != 1:
        raise ConfigError(f"objective.reward=model:{path}: that run was trained with objective.kind="
                          f"{opened.recipe.objective.kind}, and a reward model with objective.kind=reward.")
    return ModelReward(opened)
