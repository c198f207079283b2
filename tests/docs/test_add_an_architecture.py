"""The page "Add an architecture" is true: its code, as written, adds a family that meets the contract."""

import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

from dougong.core.config import from_dict
from dougong.interop.maps import MAPS
from dougong.models import FAMILIES
from dougong.nn import FEED_FORWARDS
from dougong.nn.attention_kernels import explicit

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```(\w+)([^\n]*)\n(.*?)```", re.S)
BLOCKS = {label.strip(): code for _, label, code in
          BLOCK.findall((ROOT / "docs/en/add-an-architecture.md").read_text(encoding="utf-8"))}


def _module(name, path, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def qwen2(tmp_path, monkeypatch):
    """Adds what the page says, for one test: two files, two table lines, rows in two test suites."""
    for label, code in BLOCKS.items():
        kind, _, where = label.partition("=")
        if kind == "file":
            path = tmp_path / where.replace("/", "_")
            path.write_text(code, encoding="utf-8")
            _module("dougong." + where.removesuffix(".py").replace("/", "."), path, monkeypatch)
    for table, label in ((FAMILIES, "table=FAMILIES"), (MAPS, "table=MAPS")):
        monkeypatch.setattr(table, "_entries", table._entries | eval(BLOCKS[label]))
    suites = {}
    for rows, file in (("LANGUAGE_MODELS", "contract/test_models.py"),
                       ("CASES", "unit/interop/test_parity.py")):
        suite = _module("page_" + rows.lower(), ROOT / "tests" / file, monkeypatch)
        added = eval(BLOCKS[f"rows={rows}"], vars(suite))
        getattr(suite, rows).update(added)
        suites[rows] = suite, list(added)
    return suites


def _run_rows(suite, table, rows, tmp_path, monkeypatch):
    """Runs every test of a suite that is parametrised by `table`, on the new rows; returns how many."""
    tests = [test for name, test in vars(suite).items() if name.startswith("test_")
             and any(mark.args[1] is table for mark in getattr(test, "pytestmark", []))]
    values = {"tmp_path": tmp_path, "kernel": explicit, "monkeypatch": monkeypatch}
    for test in tests:
        more = {name: values[name] for name in inspect.signature(test).parameters if name in values}
        for row in rows:
            test(row, **more)
    return len(tests)


def test_the_new_family_meets_the_contract(qwen2, tmp_path, monkeypatch):
    suite, rows = qwen2["LANGUAGE_MODELS"]
    assert _run_rows(suite, suite.LANGUAGE_MODELS, rows, tmp_path, monkeypatch) >= 12


def test_the_new_family_equals_transformers(qwen2, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    suite, rows = qwen2["CASES"]
    assert len(rows) == 2 and _run_rows(suite, suite.CASES, rows, tmp_path, monkeypatch) == 3


def test_a_family_without_its_biases_would_be_found_out(qwen2, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    suite, rows = qwen2["CASES"]
    code = BLOCKS["file=models/families/qwen2.py"]
    broken = tmp_path / "broken.py"
    broken.write_text(code.replace(", bias=True", ""), encoding="utf-8")
    assert broken.read_text() != code
    module = _module("dougong.models.families.qwen2", broken, monkeypatch)
    monkeypatch.setattr(sys.modules["dougong.interop.maps.qwen2"], "Qwen2Config", module.Qwen2Config)
    with pytest.raises(RuntimeError, match=r"query\.bias"):
        suite.test_logits_and_all_gradients_equal_transformers(rows[0])


def test_a_new_part_serves_every_decoder(tmp_path, monkeypatch):
    label = "part=FEED_FORWARDS:geglu"
    (tmp_path / "geglu.py").write_text(BLOCKS[label], encoding="utf-8")
    _module("geglu", tmp_path / "geglu.py", monkeypatch)
    monkeypatch.setattr(FEED_FORWARDS, "_entries", FEED_FORWARDS._entries | {"geglu": "geglu:GeGLUConfig"})
    model = from_dict(FAMILIES["decoder"], {
        "vocab_size": 17, "context": 8, "dim": 16, "num_layers": 2, "attention": {"num_heads": 2},
        "feed_forward": {"kind": "geglu", "ffn_dim": 24}}).build()
    model.initialise(0)
    assert torch.isfinite(model(torch.zeros(1, 4, dtype=torch.long))).all()
    assert model.stack["1"].feed_forward.gate.weight.shape == (24, 16)


def test_both_languages_show_the_same_code():
    chinese = BLOCK.findall((ROOT / "docs/zh/add-an-architecture.md").read_text(encoding="utf-8"))
    assert {label.strip(): code for _, label, code in chinese} == BLOCKS and len(BLOCKS) == 8
