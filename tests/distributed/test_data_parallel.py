"""Layouts that divide rows: whole copies (DDP), one copy in parts (FSDP2), and both (HSDP)."""

import pytest
from matrix import Case, check, decoder, divided, reference
from processes import run_processes

from dougong.runtime.layout import LayoutConfig


def test_replicas():
    case = Case(packed=True, micro_batches=2)
    check(reference(case), run_processes(2, divided, case, LayoutConfig(replicate=2)))
