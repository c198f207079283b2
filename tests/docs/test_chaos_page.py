"""The page on chaos has a row for every test of the suite, in both languages, and none that is not there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def rows_of_the_suite() -> dict[str, str]:
    """Test -> the file it stands in."""
    found = {}
    for file in sorted((ROOT / "tests/chaos").glob("test_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = [ast.unparse(mark) for mark in node.decorator_list]
                assert any(mark.startswith("pytest.mark.chaos(") for mark in marks), f"{node.name} is no row"
                found[node.name] = file.name
    return found


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_row_is_on_the_page(language):
    text = (ROOT / "docs" / language / "chaos.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"\[`(test_\w+)`\]\(\.\./\.\./tests/chaos/(test_\w+\.py)\)", text))
    assert shown == rows_of_the_suite()
    assert len(shown) > 20
