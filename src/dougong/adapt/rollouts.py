"""Experience: what the model itself writes now, what it earns, and what that makes each sample count.

Batch g is a function of g and of the weights at that moment: which tasks are asked, and every draw, come from the seed
and the number. So nothing is prefetched, and a run that is resumed at step g goes on with the same samples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dougong.adapt.rewards import Reply, Rewards, Task
from dougong.core.errors import CheckpointError, ConfigError
from dougong.data.batch import Batch
from dougong.generate.engine import Engine
from dougong.generate.sampling import SamplingConfig
from dougong.runtime.device import Runtime
from dougong.runtime.seeds import derive

_AT_ONCE = 64
"""samples that are written together"""
_NOTHING = 1e-6
"""weight of a batch in which no sample counts: a step without any weight would be taken for a broken one"""


class Spelling(Protocol):
    """How a task becomes ids and a reply becomes text."""

    stop_ids: frozenset[int]
    vocab_size: int

    def prompt(self, task: Task) -> list[int]: ...
    def text(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Sample:
    """A prompt and what was written after it, ids; the token that ended it belongs to it, the reply's text not."""

    prompt: list[int]
    written: list[int]
    reply: Reply


def write(model: nn.Module, spelling: Spelling, tasks: Sequence[Task], sampling: SamplingConfig, *, runtime: Runtime,
          samples: Sequence[int] | None = None, poll: Callable[[], None] = lambda: None) -> list[Sample]:
    """One sample of each task. `samples[i]` is which stream of draws of `sampling.seed` the i-th takes."""
    engine = Engine(model, runtime)
    streams = list(samples or [0] * len(tasks))
    prompts = [spelling.prompt(task) for task in tasks]
    found: list[Sample] = []
    for start in range(0, len(tasks), _AT_ONCE):
        here = slice(start, start + _AT_ONCE)
        written: list[list[int]] = [[] for _ in tasks[here]]
        for step in engine.start(prompts[here], sampling, stop_ids=spelling.stop_ids, samples=streams[here],
                                 vocab_size=spelling.vocab_size):
            poll()
            for token in step:
                written[token.row].append(token.id)
        for task, prompt, ids in zip(tasks[here], prompts[here], written):
            words = ids[:-1] if ids[-1] in spelling.stop_ids else ids
            found.append(Sample(prompt, ids, Reply(task, spelling.text(words), tuple(words))))
    return found


class Rollouts(Iterator[Batch]):
    """Yields the batches of `objectives.policy`, sampled with `model` as it is at that moment.

    `rows` counts the samples of a step over all processes: rank r of w asks its part of the rows / samples prompts.
    Raises ConfigError where they do not divide.
    """

    def __init__(self, tasks: Sequence[Task], model: nn.Module, spelling: Spelling, rewards: Rewards, settings: Any, *,
                 rows: int, seed: int, runtime: Runtime, fingerprint: str, rank: int = 0, world_size: int = 1) -> None:
        group = settings.samples
        if rows % group or (rows // group) % world_size or not rows:
            fitting = max(1, round(rows / group / world_size)) * group * world_size
            raise ConfigError(f"train.rows={rows} samples a step cannot be shared by groups of {group} "
                              f"(objective.samples) and {world_size} processes. Try train.rows={fitting}.")
        self._tasks, self._model, self._spelling, self._rewards = tasks, model, spelling, rewards
        self._settings, self._runtime, self._fingerprint = settings, runtime, fingerprint
        self._seed, self._prompts, self._group = seed, rows // group, group
        share = self._prompts // world_size
        self._mine = np.arange(rank * share, (rank + 1) * share)
        self.position = 0

    @property
    def batches_per_epoch(self) -> int:
        """Steps in which as many tasks are asked as there are."""
        return max(1, -(-len(self._tasks) // self._prompts))

    @property
    def number(self) -> int:
        return self.position

    def seek(self, number: int) -> None:
        self.position = number

    def __next__(self) -> Batch:
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def batch(self, number: int) -> Batch:
        """This rank's part of step `number`, with the current weights; does not move the loader."""
        asked = [self._tasks[place] for place in self._places(number)]
        sampling = SamplingConfig(max_tokens=self._settings.max_tokens, seed=derive(self._seed, "rollout", number))
        streams = [int(prompt) * self._group + sample for prompt in self._mine for sample in range(self._group)]
        samples = write(self._model, self._spelling, [task for task in asked for _ in range(self._group)], sampling,
                        runtime=self._runtime, samples=streams)
        failed = self._rewards.failed
        rewards = torch.tensor(self._rewards([sample.reply for sample in samples]), dtype=torch.float64)
        return _batch(samples, rewards.view(-1, self._group), self._settings, failed=self._rewards.failed - failed)

    def _places(self, number: int) -> list[int]:
        """The tasks that this rank asks in step `number`; every pass over them has an order of its own."""
        places = []
        for index in number * self._prompts + self._mine:
            epoch, place = divmod(int(index), len(self._tasks))
            draw = np.random.Generator(np.random.PCG64(derive(self._seed, "tasks", epoch)))
            places.append(int(draw.permutation(len(self._tasks))[place]))
        return places

    def documents(self, number: int) -> list[list[str]]:
        return [[f"task {place}"] for place in self._places(number)]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "data": self._fingerprint, **self._order()}

    def _order(self) -> dict[str, Any]:
        return {"seed": self._seed, "prompts": self._prompts, "samples": self._group}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken. Raises CheckpointError where the tasks or their order are others."""
        if state["data"] != self._fingerprint:
            raise CheckpointError("the checkpoint was made with other tasks than these.\nPut the data back as they "
                                  "were, or start a new run from the checkpoint's weights.")
        for name, value in self._order().items():
            if state[name] != value:
                raise CheckpointError(f"the checkpoint's samples were drawn with {name}={state[name]}, now it is "
                                      f"{value}.\nSet {name} back, or start a new run from the checkpoint's weights.")
        self.seek(int(state["position"]))


def _batch(samples: list[Sample], rewards_PS: Tensor, settings: Any, *, failed: int) -> Batch:
    """Only the samples that count, padded to the longest; figures of all of them beside every row."""
    advantage_PS, kept_PS = settings.advantages(rewards_PS)
    figures = {"reward": rewards_PS.mean(), "passed": (rewards_PS >= 1).double().mean(),
               "length": torch.tensor(sum(len(sample.written) for sample in samples) / len(samples)),
               "idle_groups": (~kept_PS.any(-1)).double().mean(), "failed_rewards": torch.tensor(failed / len(samples))}
    chosen = kept_PS.flatten().nonzero().flatten().tolist()
    counts = 1.0 if chosen else _NOTHING
    rows = [samples[number] for number in chosen or [0]]
    width = max(len(sample.prompt) + len(sample.written) for sample in rows) - 1
    tokens, weight = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    targets = torch.zeros_like(tokens)
    for row, sample in enumerate(rows):
        ids, begin = torch.tensor(sample.prompt + sample.written), len(sample.prompt) - 1
        tokens[row, :len(ids) - 1], targets[row, :len(ids) - 1] = ids[:-1], ids[1:]
        weight[row, begin:len(ids) - 1] = counts
    advantage = advantage_PS.flatten()[chosen].float() if chosen else torch.zeros(1)
    return Batch(tokens=tokens, targets=targets, weight=weight, advantage=advantage,
                 **{name: value.float().expand(len(rows)).clone() for name, value in figures.items()})


def greedy_score(model: nn.Module, spelling: Spelling, rewards: Rewards, tasks: Sequence[Task], *, max_tokens: int,
                 runtime: Runtime, most_tokens: int | None = None,
                 poll: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """What the model earns where it writes what it finds most likely: means over tasks, up to `most_tokens` written.

    `loss` is the negative reward, so that the best checkpoint is the one that earns most. Processes that share a run
    each write and reward for themselves, perhaps other replies with other verdicts, so they meet (`poll`) once a batch
    of tasks, and process 0 says which is the last. One that computes alone polls at every token too.
    """
    values: list[float] = []
    written, failed = 0, rewards.failed
    at_each_token = poll if runtime.mesh.devices is None else lambda: None
    for start in range(0, len(tasks), _AT_ONCE):
        poll()
        sampling = SamplingConfig(max_tokens=max_tokens, temperature=0)
        samples = write(model, spelling, tasks[start:start + _AT_ONCE], sampling, runtime=runtime, poll=at_each_token)
        values += rewards([sample.reply for sample in samples])
        written += sum(len(sample.written) for sample in samples)
        if most_tokens and runtime.from_first(written >= most_tokens):
            break
    reward = float(np.mean(values))
    return {"loss": -reward, "reward": reward, "pass_rate": float(np.mean([value >= 1 for value in values])),
            "tokens_per_reply": written / len(values), "tasks": len(values), "failed_rewards": rewards.failed - failed}
