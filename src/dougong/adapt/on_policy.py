"""Rows that the student writes itself: a corpus around another one, for a teacher to judge as the student learns.

A row keeps its first tokens as a prompt; the model that is being trained continues it, and only the continuation has
weight. Draws depend on the seed and the number of the batch alone and texts on these and the weights, so a run that was
interrupted goes on as if it had not been.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dougong.core.errors import ConfigError
from dougong.data.batch import Batch
from dougong.generate.engine import Engine
from dougong.generate.sampling import SamplingConfig
from dougong.objectives.distil import OnPolicyConfig
from dougong.runtime.device import Runtime
from dougong.runtime.seeds import derive


class OnPolicyCorpus:
    """`corpus`, of whose training rows a share is continued by `model` as it is when the batch is asked for."""

    def __init__(self, corpus: Any, model: nn.Module, section: OnPolicyConfig, runtime: Runtime) -> None:
        self._corpus, self._model, self._section, self._runtime = corpus, model, section, runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(self._corpus, name)

    def loader(self, split: str, *, rows: int, seed: int, **place: Any) -> Any:
        inner = self._corpus.loader(split, rows=rows, seed=seed, **place)
        if split != "train":
            return inner
        return OnPolicyLoader(inner, self._model, self._section, self._runtime, seed=seed,
                              tokenizer=self._corpus.tokenizer)


class OnPolicyLoader(Iterator[Batch]):
    """A loader around another one; its place in the data is that one's."""

    def __init__(self, inner: Any, model: nn.Module, section: OnPolicyConfig, runtime: Runtime, *, seed: int,
                 tokenizer: Any) -> None:
        self._inner, self._model, self._section, self._runtime = inner, model, section, runtime
        self._seed, self._tokenizer = seed, tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __next__(self) -> Batch:
        number = self._inner.number
        return self._continued(next(self._inner), number)

    def batch(self, number: int) -> Batch:
        """Batch `number` as the model would write it now; does not move the loader."""
        return self._continued(self._inner.batch(number), number)

    def _continued(self, batch: Batch, number: int) -> Batch:
        rows, keep, T = self._rows(batch), self._section.prompt_tokens, batch["tokens"].shape[1]
        if keep >= T:
            raise ConfigError(f"objective.on_policy.prompt_tokens={keep} leaves nothing to write in rows of {T} "
                              f"tokens. Try {max(1, T // 4)}.")
        fields = {name: tensor.clone() for name, tensor in batch.items()}
        texts = self._write(fields["tokens"][:rows, :keep].tolist(), T + 1 - keep, number)
        for row, text in enumerate(texts):
            written = torch.tensor(text)
            end = keep + len(text)
            sequence = torch.cat([fields["tokens"][row, :keep], written])
            for name, values in (("tokens", sequence[:-1]), ("targets", sequence[1:])):
                fields[name][row] = 0
                fields[name][row, :end - 1] = values
            fields["weight"][row] = 0
            fields["weight"][row, keep - 1:end - 1] = 1
            if "segment" in fields:
                fields["segment"][row] = 0
        return Batch(**fields)

    def _rows(self, batch: Batch) -> int:
        return max(1, math.floor(self._section.share * batch.rows + 1e-9))

    def _write(self, prompts: list[list[int]], tokens: int, number: int) -> list[list[int]]:
        """What the model writes after each prompt, its end of the text included."""
        engine = Engine(self._model, self._runtime)
        sampling = SamplingConfig(max_tokens=tokens, temperature=self._section.temperature,
                                  seed=derive(self._seed, "on policy", number))
        end = self._tokenizer.document_id
        texts: list[list[int]] = [[] for _ in prompts]
        for step in engine.start(prompts, sampling, stop_ids=() if end is None else (end,),
                                 samples=range(1, len(prompts) + 1), vocab_size=self._tokenizer.vocab_size):
            for token in step:
                texts[token.row].append(token.id)
        return texts
