"""Where data lie, said so that it holds in whatever folder one asks from: a run can then be scored and gone on with
anywhere."""

import os
from glob import has_magic
from pathlib import Path
from typing import Any

from dougong.core.config import replace


def from_anywhere(data: Any) -> Any:
    """A section of data with its places whole: `path`, and those of its `sources`."""
    if getattr(data, "path", None):
        data = replace(data, path=whole_path(data.path))
    if getattr(data, "sources", ()):
        data = replace(data, sources=tuple(map(_source, data.sources)))
    return data


def _source(source: Any) -> Any:
    places = {key: whole_path(place) for key in ("path", "dataset")
              if (place := getattr(source, key, None)) is not None}
    return replace(source, **places) if places else source


def whole_path(path: str) -> str:
    """An absolute path, a glob in a folder too. As it is where nothing is there (a hub's name, a mistake that is still
    to be told)."""
    place = os.path.expanduser(path)
    told = os.path.exists(place) or (has_magic(path) and not has_magic(os.getcwd()))
    return str(Path(place).absolute()) if told else path
