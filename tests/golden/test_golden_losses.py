"""The first losses of a tiny run of each family, written down: a change of numbers is a change someone meant.

Refresh after a change that is meant to move them (and say why in the commit):

    PYTHONPATH=tests python tests/golden/test_golden_losses.py

Everything is fp32 on one thread. The tolerance is 1e-4 of a loss of about 5.5: other processors sum in another order,
which differs by about 1e-7 of each value at first and grows with each step (optimisers divide small by small), while a
change of initialisation, order of data, schedule or update moves the second loss by 1e-2 and more.
"""

import json
import os
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_recipe import MODELS, write_recipe, write_texts

from dougong.core.config import replace
from dougong.recipes.assemble import assemble, prepare_data
from dougong.recipes.derive import resolve
from dougong.recipes.recipe import load_recipe
from dougong.train.loop import fit

FILE = Path(__file__).with_name("losses.json")
STEPS, TOLERANCE = 5, 1e-4


def losses(family: str, folder: Path) -> list[float]:
    """The training losses of five steps, in nats per token."""
    texts = folder / "texts"
    if not texts.exists():
        write_texts(texts)
    recipe = write_recipe(folder / f"{family}.yaml", texts, model=MODELS[family])
    settled, _ = resolve(load_recipe(str(recipe))[0])
    settled = replace(settled, train=replace(settled.train, steps=STEPS))
    built = assemble(settled, prepare_data(settled))
    return [result.metrics["loss"] for result in fit(built.state, built.objective, built.runtime, built.recipe.train)]


@pytest.mark.parametrize("family", list(MODELS))
def test_losses_are_those_written_down(family, tmp_path, monkeypatch):
    monkeypatch.setenv("DOUGONG_CACHE", str(tmp_path / "cache"))
    expected = json.loads(FILE.read_text())[family]
    found = losses(family, tmp_path)
    assert len(found) == len(expected) == STEPS
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=TOLERANCE)
    assert max(abs(a - b) for a, b in pairwise(expected)) > 100 * TOLERANCE, "the run does not move"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        os.environ["DOUGONG_CACHE"] = f"{place}/cache"
        FILE.write_text(json.dumps({family: losses(family, Path(place)) for family in MODELS}, indent=1) + "\n")
