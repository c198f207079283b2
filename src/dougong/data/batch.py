"""`Batch`: named tensors that travel from the loader to the objective."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Batch(Mapping[str, Tensor]):
    """Named fields whose first axis is the row; the field names are the contract between source and objective.

    Token batches carry `tokens` and `targets` (B T, int64), `weight` (B T, float32: the loss weight of each target)
    and, where rows hold several documents, `segment` (B T, int64: tokens attend only within their segment).
    Images, labels and whatever else an objective asks for travel likewise.
    """

    def __init__(self, **fields: Tensor) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> Tensor:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    @property
    def rows(self) -> int:
        return len(next(iter(self._fields.values())))

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in self._fields.items()})

    def split(self, rows: int) -> list["Batch"]:
        """Micro-batches of at most `rows` rows each, in order."""
        return [Batch(**{name: tensor[start:start + rows] for name, tensor in self._fields.items()})
                for start in range(0, self.rows, rows)]
