"""The errors a user can cause. Each says what came, what fits and what to try; the CLI prints it and exits 2."""

import difflib
from collections.abc import Iterable


class DougongError(Exception):
    """Base of every error that is the user's to mend; anything else that escapes is our bug."""


class ConfigError(DougongError):
    """A recipe, a key or a value that cannot be used."""


class DataError(DougongError):
    """Files, documents or tokens that cannot be trained on."""


class CheckpointError(DougongError):
    """A run or a checkpoint that cannot be opened, trusted or written."""


class MissingExtraError(DougongError):
    """An optional package is needed; the message names the install extra."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}, which is not installed.\n"
                         f"Try: pip install 'dougong[{extra}]'")


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the nearest option, or the list of options when none is near."""
    known = [str(option) for option in options]
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.55)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known: {', '.join(sorted(known))}." if known else ""
