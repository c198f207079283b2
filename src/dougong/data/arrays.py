"""Small array data with the face of a corpus: handwritten digits, a linear problem with a known solution."""

import hashlib
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from dougong.core.config import config
from dougong.core.errors import ConfigError, DataError, MissingExtraError
from dougong.data.batch import Batch
from dougong.data.split import SPLITS
from dougong.runtime.seeds import derive

Arrays = dict[str, np.ndarray]


@config
class DigitsData:
    """scikit-learn's handwritten digits (extra `vision`): 1,797 images of 8 x 8 in ten classes.

    The split is fixed and stratified, 70 % training, 10 % validation, 20 % test, so results compare across
    runs. Batches hold `pixels` (B 1 8 8, float32 in [0, 1]) and `labels` (B, int64).
    """

    kind: Literal["digits"] = "digits"
    of_arrays: ClassVar[bool] = True

    def prepare(self) -> "ArrayCorpus":
        """Raises MissingExtraError without scikit-learn."""
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise MissingExtraError("scikit-learn", "vision", "data.kind=digits") from None
        images, labels = load_digits(return_X_y=True)
        pixels = (np.asarray(images).reshape(-1, 1, 8, 8) / 16.0).astype(np.float32)   # 16 is white
        labels = np.asarray(labels).astype(np.int64)
        places = stratified(labels, (0.7, 0.1, 0.2), seed=0)
        return ArrayCorpus({split: {"pixels": pixels[chosen], "labels": labels[chosen]}
                            for split, chosen in zip(SPLITS, places)},
                           {"kind": "digits", "classes": 10, "split": {"rule": "stratified", "sentence":
                            "Split 70/10/20, each class in the same shares, the same for every seed."}})


def stratified(labels: np.ndarray, fractions: tuple[float, float, float], *, seed: int) -> list[np.ndarray]:
    """Ascending places of training, validation and test, each class divided by the fractions."""
    random = np.random.Generator(np.random.PCG64(derive(seed, "stratified")))
    parts: list[list[np.ndarray]] = [[], [], []]
    for label in np.unique(labels):
        places = random.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.cumsum(fractions[:2]) * len(places)).astype(int)
        for part, chosen in zip(parts, np.split(places, cuts)):
            part.append(chosen)
    return [np.sort(np.concatenate(part)) for part in parts]


@config
class RegressionData:
    """A generated linear problem: targets = features · weights + noise, all of them Gaussian.

    With more features than training rows it is under-determined: of the many exact solutions, gradient
    descent from zero finds the one of least norm, which `minimum_norm` gives in closed form. Batches hold
    `features` (B F) and `targets` (B 1).
    """

    kind: Literal["regression"] = "regression"
    of_arrays: ClassVar[bool] = True
    features: int = Field(default=64, ge=1)
    rows: int = Field(default=32, ge=1)
    """rows for training; fewer than features: under-determined"""
    held_out: int = Field(default=256, ge=1)
    """rows for validation, and as many for test"""
    noise: float = Field(default=0.0, ge=0)
    """standard deviation of what is added to each target; the targets themselves have about 1"""
    precision: Literal["float32", "float64"] = "float32"
    problem: int = 0
    """the seed of the problem: part of the data, so that runs of several seeds solve the same one"""

    @model_validator(mode="after")
    def _solvable(self) -> "RegressionData":
        if self.rows == self.features:
            raise ValueError(f"rows = features = {self.rows} is at the edge of singular: gradient descent "
                             f"would need millions of steps. Try rows={max(1, self.features // 2)}")
        return self

    def prepare(self) -> "ArrayCorpus":
        random = np.random.Generator(np.random.PCG64(derive(self.problem, "regression")))
        weights = random.standard_normal((self.features, 1)) / self.features ** 0.5
        arrays: dict[str, Arrays] = {}
        for split, count in zip(SPLITS, (self.rows, self.held_out, self.held_out)):
            features = random.standard_normal((count, self.features))
            targets = features @ weights + self.noise * random.standard_normal((count, 1))
            arrays[split] = {"features": features.astype(self.precision),
                             "targets": targets.astype(self.precision)}
        return ArrayCorpus(arrays, {
            "kind": "regression", "features": self.features, "noise": self.noise,
            "under_determined": self.rows < self.features,
            "split": {"rule": "drawn", "sentence": "Each split is drawn afresh from the same distribution."}})


def minimum_norm(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The least-squares solution of least norm, (F 1) in float64, by the singular value decomposition."""
    return np.linalg.lstsq(features.astype(np.float64), targets.astype(np.float64), rcond=None)[0]


class ArrayCorpus:
    """Arrays in three splits with the face that every corpus has."""

    def __init__(self, arrays: dict[str, Arrays], facts: dict[str, Any]) -> None:
        self._arrays = arrays
        digest = hashlib.sha256()
        for split, fields in arrays.items():
            for name, values in fields.items():
                digest.update(f"{split}/{name}/{values.dtype}/{values.shape}".encode() + values.tobytes())
        self.fingerprint = digest.hexdigest()
        self.facts = {**facts, "fingerprint": self.fingerprint, "splits": {
            split: {"rows": len(next(iter(fields.values()))), "bytes": sum(v.nbytes for v in fields.values())}
            for split, fields in arrays.items()}}

    def arrays(self, split: str) -> Arrays:
        """The whole split, a row of every field for each example."""
        if split not in self._arrays:
            raise DataError(f"no split {split!r}. Known: {', '.join(self._arrays)}.")
        return self._arrays[split]

    def loader(self, split: str, *, rows: int, seed: int, rank: int = 0,
               world_size: int = 1) -> "ArrayLoader":
        return ArrayLoader(self.arrays(split), rows=rows, seed=seed, rank=rank, world_size=world_size,
                           fingerprint=self.fingerprint)


class ArrayLoader:
    """Yields Batches for ever; each epoch is a permutation decided by the seed and its number alone.

    `rows` counts the whole step over all processes: rank r of w takes its contiguous part, so the samples of
    a step do not depend on w. The rows that do not fill a last step are left out of that epoch (other ones in
    the next), so all steps weigh the same. Raises ConfigError where `rows` is more than the split has or no
    multiple of w.
    """

    def __init__(self, arrays: Arrays, *, rows: int, seed: int, rank: int = 0, world_size: int = 1,
                 fingerprint: str = "") -> None:
        self._tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
        self._total = len(next(iter(arrays.values())))
        if not 1 <= rows <= self._total or rows % world_size:
            raise ConfigError(f"{rows} rows a step do not fit: the split has {self._total}, and each of "
                              f"{world_size} processes needs an equal part. "
                              f"Try {_fitting(rows, self._total, world_size)}.")
        self._rows, self._seed, self._rank, self._world_size = rows, seed, rank, world_size
        self._fingerprint = fingerprint
        self.epoch = 0
        self.position = 0   # batches given out in this epoch
        self._order, self._order_epoch = np.empty(0, np.int64), -1

    @property
    def batches_per_epoch(self) -> int:
        return self._total // self._rows

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.position == self.batches_per_epoch:
            self.epoch, self.position = self.epoch + 1, 0
        if self._order_epoch != self.epoch:
            self._order, self._order_epoch = self._shuffled(self.epoch), self.epoch
        chosen = torch.from_numpy(self._order[self._mine(self.position)])
        self.position += 1
        return Batch(**{name: tensor[chosen] for name, tensor in self._tensors.items()})

    def _shuffled(self, epoch: int) -> np.ndarray:
        random = np.random.Generator(np.random.PCG64(derive(self._seed, "epoch", epoch)))
        return random.permutation(self._total)

    def _mine(self, position: int) -> slice:
        share = self._rows // self._world_size
        start = position * self._rows + self._rank * share
        return slice(start, start + share)

    @property
    def number(self) -> int:
        """The number of the batch that comes next, over all epochs."""
        return self.epoch * self.batches_per_epoch + self.position

    def seek(self, number: int) -> None:
        """Goes on with batch `number`."""
        self.epoch, self.position = divmod(number, self.batches_per_epoch)

    def documents(self, number: int) -> list[list[str]]:
        """What each of this rank's rows of batch `number` is in the split."""
        epoch, position = divmod(number, self.batches_per_epoch)
        return [[f"row {row}"] for row in self._shuffled(epoch)[self._mine(position)].tolist()]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "rows": self._rows, "seed": self._seed,
                "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to where the state was taken. Raises DataError where the data, the seed or the rows differ."""
        ours = {"fingerprint": self._fingerprint, "rows": self._rows, "seed": self._seed}
        for name, here in ours.items():
            if state[name] != here:
                raise DataError(f"the saved place belongs to other data: its {name} was {state[name]}, "
                                f"here it is {here}. Continue with the recipe of the run.")
        self.epoch, self.position = int(state["epoch"]), int(state["position"])


def _fitting(rows: int, total: int, world_size: int) -> int:
    return max(world_size, min(rows, total) // world_size * world_size)
