"""Tests of parts check the package's array shapes (jaxtyping + beartype), and every test runs on one thread.

One thread, because the suite runs on two shared cores, where two threads per test only wait for each other. Shapes are
not checked where thousands of steps are taken with parts that other tests have checked: it makes these three times as
slow. `make check` checks them everywhere. Nor in `gpu`, whose tests compile blocks: the checks cannot be traced.

What a run measures of the machine before its first step is measured briefly here: no test asks how fast it is.
"""

import gc
import os
from pathlib import Path

from jaxtyping import config, install_import_hook

_hook = install_import_hook(
    ["dougong.nn", "dougong.models", "dougong.objectives", "dougong.optim", "dougong.generate"], "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

from dougong.recipes import probe  # noqa: E402
from dougong.runtime.device import end_team, matmul_flops_per_s, usable_cores  # noqa: E402

torch.set_num_threads(1)
matmul_flops_per_s.__kwdefaults__["seconds"] = 0.01
probe._WARM_STEPS, probe.measure_step.__kwdefaults__["steps"] = 1, 2
_MANY_STEPS = ("distributed", "gpu", "unit/adapt", "unit/cli", "unit/plan", "unit/recipes", "unit/report", "unit/serve",
               "unit/generate/test_engine.py", "unit/generate/test_scheduler.py", "unit/generate/test_draft_model.py",
               "test_tiny.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than cores: tests wait for disks, timers and processes too."""
    return usable_cores() + 1


@pytest.fixture(autouse=True, scope="module")
def _light_collections():
    """Runs collect garbage at their end: what has been imported and made up to here need not be looked through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _shapes(request):
    here = request.path.relative_to(Path(__file__).parent).as_posix()
    config.update("jaxtyping_disable", here.startswith(_MANY_STEPS) and "SHAPES_EVERYWHERE" not in os.environ)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_thread():
    """Whatever a recipe of the test before has set; a fork would not take further threads along."""
    if torch.get_num_threads() > 1:
        end_team()
        torch.set_num_threads(1)
