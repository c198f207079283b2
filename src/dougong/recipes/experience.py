"""Tasks as experience: the corpus whose batches are what the model writes, and that scores it by what it earns."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from dougong.adapt.rewards import Rewards, Task
from dougong.adapt.rollouts import Rollouts, greedy_score
from dougong.core.errors import ConfigError, DataError
from dougong.data.batch import Batch
from dougong.data.chat_template import ChatTemplate
from dougong.data.conversations import Conversation
from dougong.data.turns import template_for_training
from dougong.objectives.objective import Objective
from dougong.recipes.recipe import Recipe
from dougong.recipes.scored import model_reward
from dougong.runtime.device import Runtime


def with_experience(recipe: Recipe, corpus: Any, objective: Objective, model: nn.Module,
                    runtime: Runtime) -> tuple[Objective, Any]:
    """The corpus of tasks as one of experience. Raises ConfigError for other data."""
    kind = recipe.objective.kind
    if recipe.data.kind != "chats":
        raise ConfigError(f"objective.kind={kind} asks tasks with answers, and data.kind={recipe.data.kind} has none.\n"
                          "Try data.kind=chats data.path=tasks.jsonl, each line with question and answer.")
    if recipe.objective.max_tokens >= recipe.model.context:
        raise ConfigError(f"objective.max_tokens={recipe.objective.max_tokens} leaves no place for a prompt in a "
                          f"context of {recipe.model.context}. Try objective.max_tokens={recipe.model.context // 2}.")
    return objective, Experience(recipe, corpus, model, runtime)


class Experience:
    """The face of a corpus; its loader samples with the model that it was made for."""

    def __init__(self, recipe: Recipe, corpus: Any, model: nn.Module, runtime: Runtime) -> None:
        self._recipe, self._corpus, self._model, self._runtime = recipe, corpus, model, runtime
        self.tokenizer, self.facts, self.fingerprint = corpus.tokenizer, corpus.facts, corpus.fingerprint
        self._spelling = ChatSpelling(template_for_training(corpus.tokenizer), corpus.tokenizer,
                                      longest=recipe.model.context - recipe.objective.max_tokens)
        section = recipe.objective
        self._rewards = Rewards(section.reward, on_error=section.on_error, seconds=section.reward_seconds,
                                open_model=model_reward)

    def conversations(self, split: str) -> Sequence[Conversation]:
        """The tasks as they were given, with the replies that are known to be right."""
        return self._corpus.conversations(split)

    def batches(self, split: str, *, rows: int) -> Iterator[Batch]:
        """Those replies as given text."""
        return self._corpus.batches(split, rows=rows)

    def loader(self, split: str, *, rows: int, seed: int, rank: int = 0, world_size: int = 1) -> Rollouts:
        return Rollouts(self.tasks(split), self._model, self._spelling, self._rewards, self._recipe.objective,
                        rows=rows, seed=seed, runtime=self._runtime, fingerprint=f"{self.fingerprint}-{split}",
                        rank=rank, world_size=world_size)

    def score(self, model: nn.Module, runtime: Runtime, split: str, *, most_tokens: int | None = None,
              poll: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Mean reward and share of passed tasks of a split, written greedily."""
        return greedy_score(model, self._spelling, self._rewards, self.tasks(split),
                            max_tokens=self._recipe.objective.max_tokens, runtime=runtime, most_tokens=most_tokens,
                            poll=poll)

    def tasks(self, split: str) -> list[Task]:
        """The tasks of a split whose prompts leave room for an answer. Raises DataError where none does."""
        found = [task_of(conversation) for conversation in self._corpus.conversations(split)]
        fitting = [task for task in found if self._spelling.fits(task)]
        if not fitting:
            raise DataError(f"none of the {len(found):,} prompts of {split} leaves room for "
                            f"{self._recipe.objective.max_tokens} tokens in a context of {self._recipe.model.context}."
                            "\nTry a smaller objective.max_tokens.")
        return fitting


def task_of(conversation: Conversation) -> Task:
    """What stands before the last reply; the answer is the one given with it, else that reply itself."""
    last = max(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
    answer = conversation.answer if conversation.answer is not None else conversation.messages[last]["content"]
    return Task(conversation.messages[:last], answer, conversation.skill, conversation.tools)


class ChatSpelling:
    """Tasks by the chat template, with the beginning of the reply, of at most `longest` tokens."""

    def __init__(self, template: ChatTemplate, tokenizer: Any, *, longest: int) -> None:
        self._template, self._tokenizer, self._longest = template, tokenizer, longest
        end = tokenizer.document_id
        self.stop_ids = template.stop_ids | (frozenset() if end is None else frozenset({end}))
        self.vocab_size: int = tokenizer.vocab_size

    def prompt(self, task: Task) -> list[int]:
        return self._template.encode(list(task.prompt), tools=task.tools)

    def fits(self, task: Task) -> bool:
        return len(self.prompt(task)) <= self._longest

    def text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)
