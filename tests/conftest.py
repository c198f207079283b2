"""Every test checks the package's array shapes (jaxtyping + beartype) and runs on one thread.

One thread, because the suite runs on two shared cores, where two threads per test only wait for each other.
"""

from jaxtyping import install_import_hook

_hook = install_import_hook(
    ["dougong.nn", "dougong.models", "dougong.objectives", "dougong.optim", "dougong.generate"], "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
