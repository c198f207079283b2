"""What a person says they have, read: `8 h200 x 3 days`, `here x 1 hour`; `40GB`, `2B tokens`, a folder; `24GB`."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dougong.core.errors import ConfigError
from dougong.plan.laws import amount
from dougong.plan.machine import Machine, load_machine, machine

_SECONDS = {"second": 1, "sec": 1, "s": 1, "minute": 60, "min": 60, "m": 60, "hour": 3600, "h": 3600, "day": 86_400,
            "d": 86_400, "week": 604_800}
_BYTES = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "B": 1}
_COUNTS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "": 1}
_HERE = ("here", "laptop", "this", "thismachine", "cpu")
_NUMBER = r"([1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|\d+(?:[.,]\d+)?)"


@dataclass(frozen=True)
class Budget:
    """So many devices of a machine, for so long."""

    devices: int
    machine: Machine
    seconds: float

    @property
    def here(self) -> bool:
        return self.machine.name == "here"

    def flops_per_s(self, precision: str) -> float:
        """Of all devices, at the machine's stated efficiency."""
        return self.devices * self.machine.peak(precision) * self.machine.efficiency

    def __str__(self) -> str:
        devices = "this machine" if self.here else f"{self.devices} × {self.machine.name}"
        return f"{devices} for {duration(self.seconds)}"


def parse_budget(text: str) -> Budget:
    """Raises ConfigError that says what came, what fits and what to try."""
    whole = re.fullmatch(r"(.+?)\s*(?:[x×*,]|\bfor\b)\s*(\d[\d.,]*\s*[a-z]+)", text.strip(), flags=re.IGNORECASE)
    if _duration(text) is not None:     # "1 hour", and the comma of "1,5 hours" sets no device apart
        whole = None
    parts = whole.groups() if whole else ("here", text)
    seconds = _duration(parts[1])
    device = re.fullmatch(r"(?:(\d+)\s*[x×*]?\s+|(\d+)\s*[x×*]\s*)?(\S.*)", parts[0].strip(), flags=re.IGNORECASE)
    if seconds is None or device is None:
        raise ConfigError(f"--budget {text!r} is no budget. Write devices x time, such as \"8 h200 x 3 days\", "
                          "\"rtx4090 x 12 hours\" or \"here x 1 hour\".")
    count, name = int(device[1] or device[2] or 1), device[3].strip()
    if not seconds or not count:
        raise ConfigError(f"--budget {text!r} is nothing at all: both the devices and the time must be above 0.")
    if name.lower().replace(" ", "") in _HERE:
        if count > 1:
            raise ConfigError(f"--budget {text!r}: there is one machine here. Say \"here x …\", or name a kind of "
                              f"device, as in \"{count} h200 x …\".")
        return Budget(1, machine("here"), seconds)
    return Budget(count, load_machine(name) if name.endswith((".yaml", ".yml")) else machine(name), seconds)


def _number(text: str) -> float:
    """`1,500` has its thousands set apart; in `1,5` the comma is the decimal point of most of Europe."""
    grouped = re.fullmatch(r"[1-9]\d{0,2}(,\d{3})+(\.\d+)?", text)
    return float(text.replace(",", "" if grouped else "."))


def _duration(text: str) -> float | None:
    found = re.fullmatch(_NUMBER + r"\s*([a-z]+)", text.strip(), flags=re.IGNORECASE)
    unit = (found[2].lower() if found else "")
    scale = _SECONDS.get(unit) or _SECONDS.get(unit.removesuffix("s"))
    return _number(found[1]) * scale if found and scale else None


def duration(seconds: float) -> str:
    """In the unit a person would use."""
    for unit, size, from_ in (("days", 86_400, 1.5), ("hours", 3600, 1.5), ("minutes", 60, 1.5)):
        if seconds >= from_ * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


@dataclass(frozen=True)
class Text:
    """The text there is: bytes, or tokens, or neither when it was not said. `path`: a folder, file or glob."""

    bytes: float | None = None
    tokens: float | None = None
    path: str | None = None
    source: str = "not given: taken as enough for one pass"

    @property
    def amount(self) -> float | None:
        """How much there is, where that alone is known and not which text."""
        return None if self.path is not None else self.tokens if self.bytes is None else self.bytes

    def unique_tokens(self, vocab_size: int) -> float:
        """Distinct tokens to train on; infinite where nobody said."""
        if self.tokens is not None:
            return self.tokens
        return math.inf if self.bytes is None else self.bytes / bytes_per_token(vocab_size)

    def to_dict(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "tokens": self.tokens, "path": self.path, "source": self.source}


def bytes_per_token(vocab_size: int) -> float:
    """A guess before the tokenizer exists: 3.0 at 2,048 (Python's library, measured by `dougong data`) and about 4.5 at
    65,536 (English web text), in between by the logarithm. Other scripts and code differ by a third."""
    return min(max(3.0 + 0.3 * math.log2(vocab_size / 2048), 1.0), 5.0)


def parse_text(text: str | None) -> Text:
    """`40GB`, `2B tokens`, or a folder, file or glob, whose files are counted."""
    if text is None:
        return Text()
    plain = text.strip()
    if found := re.fullmatch(_NUMBER + r"\s*([KMBT]?)\s*tokens?", plain, flags=re.IGNORECASE):
        tokens = _number(found[1]) * _COUNTS[found[2].upper()]
        return Text(tokens=_some(tokens, text), source="given")
    size = _bytes(plain)
    if size is not None:
        return Text(bytes=_some(size, text), source="given")
    path = Path(plain).expanduser()
    if not path.exists() and not any(mark in plain for mark in "*?["):
        raise ConfigError(f"--data {text!r} is neither an amount nor a folder that exists. Write bytes (40GB), tokens "
                          "(\"2B tokens\"), or the path of your texts.")
    return Text(bytes=_some(_counted(path, plain), text), path=plain,
                source="sizes of the files; compressed files hold more, and duplicates and held-out text count less")


def _counted(path: Path, plain: str) -> float:
    from dougong.data.walk import Skipped, find, walk

    if path.is_file():
        return path.stat().st_size
    found = walk(path, Skipped()) if path.is_dir() else find(plain, Skipped())
    return float(sum(file.stat().st_size for _, file in found))


def _some(size: float, text: str) -> float:
    if size <= 0:
        raise ConfigError(f"--data {text!r} holds no text. Give an amount, such as 40GB, or a folder with files.")
    return size


def _bytes(text: str) -> float | None:
    found = re.fullmatch(_NUMBER + r"\s*([KMGT]?I?B)", text, flags=re.IGNORECASE)
    return _number(found[1]) * _BYTES[found[2].upper()] if found else None


@dataclass(frozen=True)
class Serving:
    """Memory that the finished model may take where it runs: weights in `precision`, and the cache of `rows` texts."""

    bytes: float
    precision: Literal["bf16", "int8"] = "bf16"
    rows: int = 1


def parse_serving(text: str | None) -> Serving | None:
    """`24GB`, `24GB int8`, `24GB int8 x 16` (sixteen texts at once)."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*([\d.,]+\s*[KMGT]?I?B)\s*(bf16|int8)?\s*(?:[x×*]\s*(\d+))?\s*", text, flags=re.IGNORECASE)
    size = _bytes(found[1]) if found else None
    if found is None or not size or found[3] == "0":
        raise ConfigError(f"--memory-for-serving {text!r} is no amount of memory. Write bytes, then perhaps the "
                          "precision of the weights and how many texts at once: 24GB, \"24GB int8\", "
                          "\"24GB int8 x 16\".")
    precision: Any = (found[2] or "bf16").lower()
    return Serving(size, precision, int(found[3] or 1))


def describe_bytes(size: float) -> str:
    return f"{amount(size).replace('K', ' k').replace('M', ' M').replace('B', ' G').replace('T', ' T')}B"
