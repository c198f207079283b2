"""An adapter trained by several processes, with copies of the model (DDP) or one in parts (FSDP2), is that of one."""

from dataclasses import replace

import pytest
from matrix import Case, check, divided, reference
from processes import run_processes

from dougong.adapt.lora import LoRAConfig
from dougong.core.errors import ConfigError
from dougong.nn.init import FanIn, initialise
from dougong.nn.lora import adapters
from dougong.runtime.layout import LayoutConfig

ADAPTED = Case(packed=True, micro_batches=2)


def _model(kind):
    return LoRAConfig(kind=kind, rank=4).apply(ADAPTED.model.build(), seed=0)


class _Adapted:
    """A model config whose models have an adapter, for the cases of `matrix`."""

    vocab_size = ADAPTED.model.vocab_size

    def __init__(self, kind):
        self.kind = kind

    def build(self):
        model = _model(self.kind)
        model.initialise = lambda seed, model=model, kind=self.kind: _fill(model, kind, seed)
        return model


def _fill(model, kind, seed):
    """First weights, then an adapter that changes something already."""
    type(model).initialise(model, seed)
    LoRAConfig(kind=kind, rank=4).fill(model, seed=seed)
    for part in adapters(model).values():
        part.init["lora_b"] = FanIn(0.3)
    initialise(model, seed, only={f"{name}.lora_b" for name in adapters(model)})


def _case(kind):
    return replace(ADAPTED, model=_Adapted(kind))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("layout", [
    LayoutConfig(replicate=2), LayoutConfig(shard=2), LayoutConfig(replicate=2, shard=2)], ids=str)
def test_adapters_over_rows_divided(kind, layout):
    check(reference(_case(kind)), run_processes(layout.processes, divided, _case(kind), layout))


def test_what_cuts_matrices_apart_is_refused_by_name():
    from dougong.recipes.assemble import _check_adapter_divisible

    class Mesh:
        layout = LayoutConfig(tensor=2)

        def size(self, *axes):
            return self.layout.size(*axes)

    class Recipe:
        adapt = adapter = LoRAConfig(rank=4)

    with pytest.raises(ConfigError, match="replicate and shard alone"):
        _check_adapter_divisible(Recipe, Mesh())
