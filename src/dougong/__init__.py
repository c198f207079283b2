"""dougong (斗拱): build your own large model, from a folder of files on a laptop to a cluster.

    import dougong
    finished = dougong.train("first", "data.path=~/texts")
    print(dougong.generate(finished.directory.path, "Once upon a time")[0].text)
"""

import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_API = ("Finished", "OpenRun", "Recipe", "SamplingConfig", "generate", "load_recipe", "open_run", "resume_run", "train")


class _Package(ModuleType):
    """`dougong.train` and `dougong.generate` are the verbs; the rooms of these names are reached by `from … import`.

    Importing a room would otherwise put its module over the function. The API is imported on first use, so that
    `import dougong` alone loads no torch.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _API and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in _API:
            from importlib import import_module

            return getattr(import_module("dougong.api"), name)
        raise AttributeError(f"module 'dougong' has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted([*super().__dir__(), *_API])


sys.modules[__name__].__class__ = _Package
