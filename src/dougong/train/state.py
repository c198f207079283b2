"""Everything that training changes, in one place that can be saved and put back."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dougong.core.errors import CheckpointError
from dougong.data.batch import Batch
from dougong.runtime import seeds
from dougong.train.shadow import Shadow, tracked


class Loader(Protocol):
    """What the loop asks of a source of batches: endless, and able to return to any place."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainState:
    """Model, optimiser, loader, lagged copy, random numbers, and the counters of the run.

    `step` and `tokens` count what was done, `elapsed_s` is training time over all attempts, `skips` the
    skipped steps in a row, `best` the lowest validation loss with its step and the evaluations since
    (`waited`), `window` the sums of steps not yet logged. `stop` is set by whoever wants training to end
    after this step, and names the reason; it is not saved.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Callable[[int], float],
                 loader: Loader, shadow: Shadow | None = None) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.loader, self.shadow = loader, shadow
        self.step = self.tokens = self.skips = 0
        self.elapsed_s = 0.0
        self.best: dict[str, Any] | None = None
        self.window: dict[str, float] = {}
        self.stop: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """`tensors`: file -> name -> tensor (the live ones); `json`: all the rest as JSON values."""
        optimizer_tensors, optimizer_json = _flatten_optimizer(self.optimizer)
        rng = seeds.rng_state()
        tensors = {"model": {name: t.detach() for name, t in tracked(self.model).items()},
                   "optimizer": optimizer_tensors,
                   "rng": {name: rng.pop(name) for name in ("torch", "cuda") if name in rng}}
        counters = {name: getattr(self, name) for name in _COUNTERS}
        json = {**counters, "optimizer": optimizer_json, "loader": self.loader.state_dict(), "rng": rng,
                "shadow": None}
        if self.shadow:
            shadow = self.shadow.state_dict()
            tensors["shadow"] = shadow["tensors"]
            json["shadow"] = {"updates": shadow["updates"]}
        return {"tensors": tensors, "json": json}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` returned. Raises CheckpointError, before anything changes, if it is of
        another model, optimiser or averaging."""
        tensors, json = state["tensors"], state["json"]
        _check(self, tensors, json)
        load_weights(self.model, tensors["model"])
        self.optimizer.load_state_dict(_unflatten_optimizer(self.optimizer, tensors["optimizer"],
                                                            json["optimizer"]))
        if self.shadow:
            self.shadow.load_state_dict({"updates": json["shadow"]["updates"], "tensors": tensors["shadow"]})
        self.loader.load_state_dict(json["loader"])
        for name in _COUNTERS:
            setattr(self, name, json[name])
        seeds.set_rng_state({**json["rng"], **tensors["rng"]})


_COUNTERS = ("step", "tokens", "skips", "elapsed_s", "best", "window")


@torch.no_grad()
def load_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copies tensors into a model by name. Raises CheckpointError naming what is missing, unknown or
    misshapen."""
    own = tracked(model)
    _same_tensors("model", own, tensors)
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def _check(state: TrainState, tensors: dict[str, dict[str, Tensor]], json: dict[str, Any]) -> None:
    _same_tensors("model", tracked(state.model), tensors["model"])
    if (state.shadow is not None) != (json["shadow"] is not None):
        raise CheckpointError("the checkpoint was made " + ("without" if state.shadow else "with")
                              + " an average of the weights (train.ema). Resume with the recipe it was made "
                                "with.")
    saved = [group["param_names"] for group in json["optimizer"]["groups"]]
    own = [group["param_names"] for group in state.optimizer.param_groups]
    if saved != own or json["optimizer"]["class"] != type(state.optimizer).__name__:
        raise CheckpointError(f"the checkpoint's optimiser is {json['optimizer']['class']} with "
                              f"{len(saved)} parameter "
                              f"groups, this one is {type(state.optimizer).__name__} with {len(own)}.\n"
                              "Resume with the recipe the checkpoint was made with.")


def _same_tensors(what: str, own: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    lines = [f"missing: {name}" for name in own.keys() - saved.keys()]
    lines += [f"unknown: {name}" for name in saved.keys() - own.keys()]
    lines += [f"{name}: {tuple(saved[name].shape)} in the checkpoint, {tuple(own[name].shape)} here"
              for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape]
    if lines:
        shown = "\n  ".join(sorted(lines)[:8]) + (f"\n  … and {len(lines) - 8} more" if len(lines) > 8
                                                  else "")
        raise CheckpointError(f"the checkpoint's {what} is not this one:\n  {shown}\n"
                              "Open it with the recipe it was made with.")


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors as `parameter/slot`; hyperparameters and other values as JSON."""
    tensors: dict[str, Tensor] = {}
    groups, values = [], {}
    for group in optimizer.param_groups:
        groups.append({key: list(value) if isinstance(value, tuple) else value
                       for key, value in group.items() if key != "params"})
        for name, parameter in zip(group["param_names"], group["params"]):
            for slot, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{slot}"] = value
                elif value is not None:
                    values[f"{name}/{slot}"] = value
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "values": values}


def _unflatten_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor],
                         json: dict[str, Any]) -> dict[str, Any]:
    """torch's own index-keyed form, in the order of this optimiser's parameters."""
    numbers = {name: number for number, name in enumerate(
        name for group in optimizer.param_groups for name in group["param_names"])}
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | json["values"]).items():
        name, _, slot = key.rpartition("/")
        state.setdefault(numbers[name], {})[slot] = value.clone() if isinstance(value, Tensor) else value
    groups = []
    for own, saved in zip(optimizer.param_groups, json["groups"]):
        restored = {key: tuple(value) if isinstance(own.get(key), tuple) else value for key,
                    value in saved.items()}
        groups.append({**restored, "params": [numbers[name] for name in saved["param_names"]]})
    return {"state": state, "param_groups": groups}
