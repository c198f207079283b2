"""Layouts that divide rows: whole copies (DDP), one copy in parts (FSDP2), and both (HSDP)."""

import pytest
from matrix import Case, check, decoder, divided, reference
from processes import run_processes

from dougong.optim.build import MuonConfig
from dougong.runtime.layout import LayoutConfig

MUON = Case(model=decoder(num_layers=3), optimizer=MuonConfig(cautious=True, weight_decay=0.1, eps=1e-3))
PACKED = Case(packed=True, micro_batches=2)
UNTIED = Case(model=decoder(tied=False, vocab_size=97, num_layers=3), checkpoint_activations="full")


@pytest.mark.parametrize(("case", "layout"), [
    (PACKED, LayoutConfig(replicate=2)),
    (PACKED, LayoutConfig(shard=2)),
    (PACKED, LayoutConfig(shard=2, gathered="step")),
    (UNTIED, LayoutConfig(shard=4)),
    (PACKED, LayoutConfig(replicate=2, shard=2)),
    (MUON, LayoutConfig(shard=2)),
    (MUON, LayoutConfig(replicate=2, shard=2, tensor=2)),
], ids=lambda value: str(value) if isinstance(value, LayoutConfig) else "")
def test_rows_divided(case, layout):
    check(reference(case), run_processes(layout.processes, divided, case, layout))
