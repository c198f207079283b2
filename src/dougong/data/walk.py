"""Which files of a folder are read: all in a fixed order, save the hidden, the secret and the installed."""

import fnmatch
import os
from collections.abc import Iterator
from glob import glob, has_magic
from pathlib import Path

from dougong.core.errors import DataError, did_you_mean

_EXAMPLES = 20
_REASONS = 4    # told in a line

# Files that hold keys or passwords by their usual names (lower case). `credentials.py` is code and stays.
_SECRETS = (".env", ".env.*", "*.env", ".netrc", "_netrc", ".pgpass", ".npmrc", ".pypirc", ".htpasswd",
            ".git-credentials", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p12",
            "*.pfx", "*.ppk", "*.jks", "*.keystore", "*.kdbx", "*.gpg", "*.tfstate", "credentials",
            "wallet.dat",
            *(f"{stem}.{suffix}" for stem in ("*credentials", "secrets", "secret", "passwords",
                                              "client_secret*", "service-account*", "service_account*")
              for suffix in ("json", "yaml", "yml", "toml", "ini", "cfg", "csv", "txt", "xml")))
_PRIVATE_KEY = b"PRIVATE KEY-----"
_INSTALLED = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})


class Skipped:
    """What was not read and why: a count for each reason, and the first twenty by name."""

    def __init__(self) -> None:
        self._count: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    def add(self, reason: str, name: str, where: str = "") -> None:
        self._count[reason] = self._count.get(reason, 0) + 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            shown = f"{name} ({where})" if where else name
            examples.append(shown.encode(errors="backslashreplace").decode())   # of a record with half a surrogate pair

    def facts(self) -> dict[str, dict]:
        """`{reason: {"count": n, "examples": [name (where), …]}}`, the most frequent reason first."""
        order = sorted(self._count, key=lambda reason: (-self._count[reason], reason))
        return {reason: {"count": self._count[reason], "examples": self._examples[reason]}
                for reason in order}

    def __str__(self) -> str:
        lines = [f"  {fact['count']} {reason}: {', '.join(fact['examples'][:3])}{', …' * (fact['count'] > 3)}"
                 for reason, fact in self.facts().items()]
        return "\n".join(lines) or "  nothing"


def left_out(skipped: dict[str, dict]) -> str:
    """The facts of `Skipped` in a few words, without names: `4 left out: 3 binary, 1 empty`. Nothing where none was."""
    counts = [f"{fact['count']:,} {reason}" for reason, fact in skipped.items()]
    total = sum(fact["count"] for fact in skipped.values())
    return f"{total:,} left out: {', '.join(counts[:_REASONS])}{', …' * (len(counts) > _REASONS)}" if counts else ""


def looks_secret(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in _SECRETS)


def holds_private_key(path: Path) -> bool:
    """Whether the first line announces a private key, whatever the file is called."""
    with open(path, "rb") as file:
        return _PRIVATE_KEY in file.readline(200)


def find(pattern: str, skipped: Skipped) -> Iterator[tuple[str, Path]]:
    """Yields (name, path) for each file of a folder, a glob, or for the one file named, sorted by path.

    A name is the path below the folder (or below the fixed part of the glob), with `/`. Raises DataError
    where nothing exists at the path, naming the nearest neighbour.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        yield from walk(path, skipped)
    elif path.exists():
        yield from _admit(path, path.name, skipped)
    elif has_magic(pattern):
        fixed = Path(*_before_magic(path.parts))
        matches = sorted(Path(match) for match in glob(str(path), recursive=True))
        if not matches:
            raise DataError(f"no file matches {pattern!r}.\nTry a folder, or quote the pattern and use ** "
                            "for sub-folders: 'texts/**/*.txt'.")
        for match in matches:
            if match.is_file():
                yield from _admit(match, _name(match, fixed), skipped)
            elif "**" not in pattern:   # ** already lists what lies inside
                for name, inner in walk(match, skipped):
                    yield f"{_name(match, fixed)}/{name}", inner
    else:
        parent = next(p for p in path.absolute().parents if p.is_dir())
        hint = did_you_mean(path.absolute().relative_to(parent).parts[0], sorted(os.listdir(parent))[:200])
        raise DataError(f"there is no file or folder {pattern!r}.\n"
                        f"{parent} exists.{hint if 'Did you' in hint else ''} "
                        "Give a folder, a file or a glob of texts.")


def _before_magic(parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts:
        if has_magic(part):
            return
        yield part


def _name(path: Path, root: Path) -> str:
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "replace")


def walk(root: Path, skipped: Skipped) -> Iterator[tuple[str, Path]]:
    """Yields (name, path) of the admitted files below `root`, each folder's entries in the order of their
    names.

    Links to folders are not followed: they could lead round in a circle.
    """
    yield from _walk(root, root, skipped)


def _walk(folder: Path, root: Path, skipped: Skipped) -> Iterator[tuple[str, Path]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        skipped.add("unreadable folder", _name(folder, root), error.strerror or "")
        return
    for entry in entries:
        path, name = Path(entry.path), _name(Path(entry.path), root)
        if not os.path.isdir(path):     # where a link leads round in a circle or is closed, entry.is_dir() raises
            if entry.name.startswith(".") and not looks_secret(entry.name):
                skipped.add("hidden file", name)
            else:
                yield from _admit(path, name, skipped)
        elif entry.name.startswith("."):
            skipped.add("hidden folder", name)
        elif entry.is_symlink():
            skipped.add("link to a folder", name)
        elif entry.name in _INSTALLED or os.path.isfile(path / "pyvenv.cfg"):
            skipped.add("folder of installed or generated files", name)
        else:
            yield from _walk(path, root, skipped)


def _admit(path: Path, name: str, skipped: Skipped) -> Iterator[tuple[str, Path]]:
    try:
        if not path.is_file():
            skipped.add("not a regular file", name)
        elif looks_secret(path.name) or holds_private_key(path):
            skipped.add("looks like a secret", name)
        elif not path.stat().st_size:
            skipped.add("empty", name)
        else:
            yield name, path
    except OSError as error:
        skipped.add("unreadable file", name, error.strerror or "")
