"""How many rows fit is known before training, and asking changes nothing."""

from dataclasses import replace

import pytest
import torch
from tiny_training import OBJECTIVE, RUNTIME, CountingLoader, assert_same, flat, tiny_state
from torch import nn

from dougong.core.errors import ConfigError
from dougong.data.batch import Batch
from dougong.objectives import OBJECTIVES
from dougong.optim.build import SGDConfig
from dougong.train import memory
from dougong.train.state import TrainState


def batch_of(rows):
    return next(iter(CountingLoader(rows=rows)))


def test_plenty_of_memory_takes_the_whole_batch_and_leaves_no_trace():
    state = tiny_state()
    before = flat(state)
    rows, reason = memory.choose_micro_rows(state, OBJECTIVE, RUNTIME, batch_of(12))
    assert rows == 12 and "12 rows" in reason
    assert_same(before, flat(state))
    assert all(p.grad is None for p in state.model.parameters())


def test_scarce_memory_takes_equal_parts_or_explains_what_would_fit(monkeypatch):
    state = tiny_state()
    per_row = memory._TRANSIENT * memory.kept_bytes(state.model, OBJECTIVE, batch_of(2), RUNTIME) / 2
    fixed = 3 * sum(p.numel() * 4 for p in state.model.parameters())
    monkeypatch.setattr(memory, "available_bytes", lambda device: (fixed + 4.5 * per_row) / memory._HEADROOM)
    assert memory.choose_micro_rows(state, OBJECTIVE, RUNTIME, batch_of(12))[0] == 4
    with pytest.raises(ConfigError, match=r"train\.micro_rows=4 \(or 3, 2, 1\)"):
        memory.choose_micro_rows(state, OBJECTIVE, RUNTIME, batch_of(12), 12)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10.0)
    with pytest.raises(ConfigError, match="Not even one row"):
        memory.choose_micro_rows(state, OBJECTIVE, RUNTIME, batch_of(12))


def test_a_batch_that_may_not_be_split_is_told_to_shrink(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = TrainState(model, SGDConfig().build(model), lambda step: 1.0, [])
    batch = Batch(pixels=torch.rand(8, 2), labels=torch.zeros(8, dtype=torch.long))
    objective = OBJECTIVES["classify"]().build()
    per_row = memory._TRANSIENT * memory.kept_bytes(model, objective, batch.split(2)[0], RUNTIME) / 2
    fixed = 3 * sum(t.numel() * t.element_size() for t in model.state_dict().values())
    monkeypatch.setattr(memory, "available_bytes", lambda device: (fixed + 4.5 * per_row) / memory._HEADROOM)
    with pytest.raises(ConfigError, match=r"train\.rows=4"):
        memory.choose_micro_rows(state, objective, RUNTIME, batch)


def test_kept_bytes_count_what_a_known_graph_keeps():
    model = nn.Sequential(nn.Linear(4, 1000), nn.GELU(), nn.Linear(1000, 1))
    batch = Batch(features=torch.rand(50, 4), targets=torch.rand(50, 1))
    kept = memory.kept_bytes(model, OBJECTIVES["regression"]().build(), batch, RUNTIME)
    assert 2 * 50 * 1000 * 4 <= kept < 2.1 * 50 * 1000 * 4      # GELU's input and its output


def test_counting_compiles_nothing_so_that_the_rows_of_the_run_are_the_first_shape():
    class Squared(nn.Module):
        def forward(self, x):
            return x.square().sum(-1, keepdim=True)

    model, shapes = nn.Sequential(nn.Linear(4, 10), Squared()), []
    objective, runtime = OBJECTIVES["regression"]().build(), replace(RUNTIME, compile=True)

    def backend(graph, inputs):
        shapes.extend(tuple(x.shape) for x in inputs)
        return graph.forward

    def batch(rows):
        return Batch(features=torch.rand(rows, 4), targets=torch.rand(rows, 1))

    expected = memory.kept_bytes(model, objective, batch(2), RUNTIME)
    model[1].compile(backend=backend)
    for _ in range(2):      # before it has been compiled, and after
        assert memory.kept_bytes(model, objective, batch(2), runtime) == expected
        objective.losses(model, batch(50))
        assert shapes == [(50, 10)]


def test_kept_bytes_count_the_products_that_selective_checkpointing_keeps():
    from dougong.models import FAMILIES

    model = FAMILIES["qwen3"](vocab_size=31, context=32, dim=32, num_layers=3, num_heads=4).build()
    model.initialise(0)
    tokens = torch.zeros(2, 16, dtype=torch.long)
    batch = Batch(tokens=tokens, targets=tokens, weight=torch.ones(2, 16))
    found = {}
    for mode in ("none", "selective", "full"):
        model.stack.checkpoint_activations = mode
        found[mode] = memory.kept_bytes(model, OBJECTIVES["causal_lm"]().build(), batch, RUNTIME)
    a_query = 2 * 16 * 32 * 4
    assert found["full"] + 3 * 8 * a_query < found["selective"] < found["none"]


def test_available_memory_is_a_sensible_number():
    assert 1e7 < memory.available_bytes(torch.device("cpu")) < 1e14


def test_files_that_a_container_has_read_are_no_memory_taken(tmp_path):
    assert memory._left_in(tmp_path) == float("inf")
    for name, text in (("max", "8000\n"), ("current", "7000\n"), ("stat", "anon 1500\ninactive_file 5000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory._left_in(tmp_path) == 8000 - 7000 + 5000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left_in(tmp_path) == float("inf")
