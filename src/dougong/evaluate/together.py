"""Bits per byte by many processes, each scoring its rows: what an evaluation during a divided training costs and says.

The same windows as `bits_per_byte` with stride = context, so the figure is the same to rounding; sums come back
instead of a figure for each document, because no process may hold the whole model.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dougong.core.errors import DataError
from dougong.data.batch import Batch
from dougong.objectives.losses import Losses
from dougong.runtime.collectives import all_sum
from dougong.runtime.device import Runtime
from dougong.runtime.mesh import LOSS


def bits_per_byte_together(losses: Callable[[Batch], Losses], tokenizer: Any, documents: Sequence[Any], *, rows: int,
                           context: int, runtime: Runtime, poll: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """`{"loss": nats per token, "bits_per_byte", "tokens"}` over all processes.

    `losses` gives this process's share of the sums of its rows (with `metrics["loss"]` in nats); it is called equally
    often everywhere, with `rows` rows of `context` tokens, some of no weight; and before it `poll`, which may raise.
    """
    size = sum(len(document.text.encode()) for document in documents)
    if not size:
        raise DataError("there is no text to evaluate: the split holds no documents, or only empty ones.")
    streams, free_nats = _streams(tokenizer, documents)
    windows = [(stream, begin) for stream in streams for begin in range(0, len(stream) - 1, context)]
    tokens = sum(len(stream) - 1 for stream in streams) + (1 if free_nats else 0)
    nats = torch.zeros((), dtype=torch.float64)
    mesh = runtime.mesh
    for begin in range(0, len(windows), rows * mesh.data_size):
        poll()
        first = begin + mesh.data_rank * rows
        mine = windows[first:first + rows]
        nats += losses(_batch(mine, rows, context).to(runtime.device)).metrics["loss"].cpu().double()
    total = float(all_sum(nats, mesh.group(*LOSS))) + free_nats
    return {"loss": total / max(tokens, 1), "bits_per_byte": total / math.log(2) / size, "tokens": tokens}


def _streams(tokenizer: Any, documents: Sequence[Any]) -> tuple[list[np.ndarray], float]:
    """Token sequences whose first token is not scored, and the nats of a first token that nothing precedes."""
    ids = [np.asarray(tokenizer.encode(document.text), dtype=np.int64) for document in documents]
    begin = tokenizer.first_id
    if begin is None:
        return [np.concatenate(ids)], math.log(tokenizer.vocab_size)
    return [np.concatenate([[begin], part]) for part in ids], 0.0


def _batch(windows: Sequence[tuple[np.ndarray, int]], rows: int, context: int) -> Batch:
    """Windows side by side, padded on the right and below with what has no weight."""
    fields = {"tokens": np.zeros((rows, context), np.int64), "targets": np.zeros((rows, context), np.int64),
              "weight": np.zeros((rows, context), np.float32)}
    for row, (stream, begin) in enumerate(windows):
        length = min(context, len(stream) - 1 - begin)
        fields["tokens"][row, :length] = stream[begin:begin + length]
        fields["targets"][row, :length] = stream[begin + 1:begin + length + 1]
        fields["weight"][row, :length] = 1
    return Batch(**{name: torch.from_numpy(values) for name, values in fields.items()})
