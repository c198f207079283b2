"""Lazy name tables: a short `kind` in a recipe finds a class without importing the others."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from dougong.core.errors import ConfigError, did_you_mean


class Table(Mapping[str, Any]):
    """Maps a short name to an object given as `"module:attribute"`, imported on first use.

    `what` names the choice in errors ("model family"). Raises ConfigError with the nearest name for an
    unknown one, so a typo in a recipe never becomes a KeyError.
    """

    def __init__(self, what: str, entries: Mapping[str, str]) -> None:
        self.what = what
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        if name not in self._entries:
            raise ConfigError(f"unknown {self.what} {name!r}.{did_you_mean(name, self._entries)}")
        module, _, attribute = self._entries[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
