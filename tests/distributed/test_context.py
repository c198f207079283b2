"""Stretches of rows on several processes compute what whole rows compute on one."""

import pytest
import torch
from matrix import Case, check, decoder, divided, reference
from processes import run_processes

from dougong.core.config import replace
from dougong.core.errors import ConfigError
from dougong.data.batch import Batch
from dougong.models import FAMILIES
from dougong.nn.attention import AttentionConfig
from dougong.nn.position import ALiBiConfig, LearnedConfig, RoPEALiBiConfig, SinusoidalConfig
from dougong.parallel.context import context_slice, why_not_context
from dougong.runtime.layout import LayoutConfig
from dougong.runtime.mesh import Mesh

HEADS = AttentionConfig(num_heads=4, num_kv_heads=1, qk_norm="learned")     # fewer key heads than processes
CASES = {
    "plain": Case(),
    "packed": Case(packed=True, micro_batches=2, checkpoint_activations="selective"),
    "packed, one key head, windows": Case(model=decoder(attention=HEADS, window=5, window_pattern="SL"), packed=True),
    "packed, learned positions, value embeddings": Case(
        model=decoder(position=LearnedConfig(), value_embeddings="all"), packed=True),
    "packed, rope and alibi, checkpointed": Case(
        model=decoder(position=RoPEALiBiConfig()), packed=True, checkpoint_activations="full"),
    "packed, four layers": Case(model=decoder(num_layers=4, tied=False), packed=True, micro_batches=4),
    "packed, compiled, checkpointed": Case(packed=True, compiled=True, steps=1, checkpoint_activations="selective"),
    "alibi": Case(model=decoder(position=ALiBiConfig())),
    "packed, sinusoidal": Case(model=decoder(position=SinusoidalConfig()), packed=True),
}
METHODS = ("gather", "all_to_all")
ON_FOUR = ("packed, one key head, windows", "packed, rope and alibi, checkpointed")
ROWS = [(name, method, LayoutConfig(context=4, replicate=1)) for name in ON_FOUR for method in METHODS]
ROWS += [(name, method, LayoutConfig(context=2, replicate=1)) for name in CASES for method in METHODS
         if name not in (*ON_FOUR, "packed, four layers")]
ROWS += [("packed", method, LayoutConfig(context=2, shard=2, replicate=1)) for method in METHODS]
ROWS += [("packed", "all_to_all", LayoutConfig(context=2, replicate=2)),
         ("packed, four layers", "all_to_all", LayoutConfig(context=2, pipeline=2, replicate=1))]
ROWS += [(name, method, LayoutConfig(context=2, tensor=2, replicate=1)) for name, method in
         (("alibi", "all_to_all"), ("packed", "gather"), ("packed, one key head, windows", "all_to_all"))]


@pytest.fixture(scope="module")
def references():
    known = {}

    def of(name):
        if name not in known:
            known[name] = reference(CASES[name])
        return known[name]
    return of


@pytest.mark.parametrize(("name", "method", "layout"), ROWS, ids=lambda value: str(value))
def test_divided_rows_give_the_same_losses_gradients_and_weights(name, method, layout, references):
    layout = replace(layout, context_method=method)
    check(references(name), run_processes(layout.processes, divided, CASES[name], layout))


def test_a_batch_is_cut_but_for_its_segments():
    fields = {name: torch.arange(24).view(2, 12) for name in ("tokens", "targets", "weight", "segment")}
    batch, cuts = Batch(**fields), []
    for rank in range(3):
        mesh = Mesh(LayoutConfig(context=3, replicate=1))
        object.__setattr__(mesh, "rank", lambda *axes, rank=rank: rank)
        cuts.append(context_slice(batch, mesh))
    for name in ("tokens", "targets", "weight"):
        assert torch.equal(torch.cat([cut[name] for cut in cuts], 1), batch[name])
    assert all(torch.equal(cut["segment"], batch["segment"]) for cut in cuts)
    assert context_slice(batch, Mesh()) is batch
    with pytest.raises(ConfigError, match=r"12 tokens.*context=5.*Try layout.context=4"):
        context_slice(batch, Mesh(LayoutConfig(context=5, replicate=1)))


@pytest.mark.parametrize(("context", "method", "heads", "reason"), [
    (3, "gather", (4, 2), "Try layout.context=2"),
    (2, "gather", (3, 1), None),
    (2, "all_to_all", (3, 1), "layout.context_method=gather"),
    (4, "all_to_all", (12, 3), "num_kv_heads=3"),
    (4, "all_to_all", (4, 1), None),
    (2, "all_to_all", (8, 4), None),
])
def test_what_does_not_divide_is_refused_with_what_does(context, method, heads, reason):
    model = decoder(dim=48, attention=AttentionConfig(num_heads=heads[0], num_kv_heads=heads[1]))
    found = why_not_context(model, context, method)
    assert found is None if reason is None else reason in found
    assert why_not_context(model, 1, method) is None


def test_heads_are_counted_as_tensor_parallelism_leaves_them():
    model = decoder(attention=AttentionConfig(num_heads=4, num_kv_heads=4))
    assert why_not_context(model, 2, "all_to_all", tensor=2) is None
    assert "of each tensor process" in why_not_context(model, 4, "all_to_all", tensor=2)


def test_models_without_tokens_are_refused():
    assert "kind=cnn" in why_not_context(FAMILIES["cnn"](num_classes=3), 2, "gather")
