"""Numbers and words for people, in English and simplified Chinese at once.

A `Text` carries both languages; in HTML it becomes two spans of which the page's toggle shows one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeGuard

from markupsafe import Markup, escape

NARROW = "\u202f"  # narrow no-break space: between digit groups, and between a number and its unit
MINUS = "\u2212"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Text:
    """The same words in both languages. Escapes itself wherever a template prints it."""

    en: str
    zh: str

    @classmethod
    def same(cls, text: object) -> "Text":
        return cls(str(text), str(text))

    def filled(self, **values: object) -> "Text":
        """With its braces filled; a `Text` fills each language with its own words."""
        return Text(self.en.format(**{k: v.en if isinstance(v, Text) else v for k, v in values.items()}),
                    self.zh.format(**{k: v.zh if isinstance(v, Text) else v for k, v in values.items()}))

    def __html__(self) -> str:
        if self.en == self.zh:
            return str(escape(self.en))
        return str(
            Markup('<span class="en" lang="en">{}</span><span class="zh" lang="zh-Hans">{}</span>').format(
                self.en, self.zh
            )
        )

    @property
    def svg(self) -> Markup:
        """The same inside an SVG `<text>`."""
        if self.en == self.zh:
            return escape(self.en)
        return Markup('<tspan class="en">{}</tspan><tspan class="zh">{}</tspan>').format(self.en, self.zh)

    @property
    def plain(self) -> str:
        """For places that hold text only and cannot toggle, such as an SVG's title."""
        return self.en if self.en == self.zh else f"{self.en} · {self.zh}"

    def __add__(self, other: "Text") -> "Text":
        return Text(self.en + other.en, self.zh + other.zh)


Formatter = Callable[[float], Text]
UNKNOWN = Text.same("–")


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def exact(value: float) -> Text:
    """All digits, in groups of three: 2 064 384."""
    if not is_number(value):
        return UNKNOWN
    return Text.same(f"{round(value):,}".replace(",", NARROW).replace("-", MINUS))


def compact(value: float, *, trim: bool = False) -> Text:
    """Three digits and the word people use: 2.06 M, 206 万. `trim` drops zeros at the end, for an axis."""
    if not is_number(value):
        return UNKNOWN
    return Text(
        _scaled(value, ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")), trim=trim),
        _scaled(value, ((1e12, "万亿"), (1e8, "亿"), (1e4, "万")), trim=trim),
    )


def significant(value: float, digits: int = 3, *, trim: bool = True) -> Text:
    """`digits` significant digits; powers of ten only where zeros would be hard to count."""
    if not is_number(value):
        return UNKNOWN
    if value == 0:
        return Text.same("0")
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if -5 <= exponent < 6:
        text = f"{value:.{max(digits - 1 - exponent, 0)}f}"
        if "." in text and trim:
            text = text.rstrip("0").rstrip(".")
    else:
        mantissa = f"{value / 10.0**exponent:.{digits - 1}f}".rstrip("0").rstrip(".")
        text = f"{mantissa}{NARROW}×{NARROW}10{str(exponent).translate(_SUPERSCRIPT)}"
    return Text.same(text.replace("-", MINUS))


def fixed(value: float, digits: int = 3) -> Text:
    return Text.same(f"{value:.{digits}f}".replace("-", MINUS)) if is_number(value) else UNKNOWN


def percent(fraction: float, digits: int = 0) -> Text:
    if not is_number(fraction):
        return UNKNOWN
    text = f"{100 * fraction:.{digits}f}".replace("-", MINUS)
    return Text(f"{text}{NARROW}%", f"{text}%")


def points(fraction: float) -> Text:
    """A difference of two percentages: 0.6 points."""
    if not is_number(fraction):
        return UNKNOWN
    text = f"{100 * fraction:.1f}".replace("-", MINUS)
    return Text(f"{text} points", f"{text} 个百分点")


def data_size(value: float) -> Text:
    """Bytes of data in powers of 1000: 18.5 MB."""
    return _unit_size(value, 1000, ("bytes", "kB", "MB", "GB", "TB"))


def memory_size(value: float) -> Text:
    """Bytes of memory in powers of 1024: 1.40 GiB."""
    return _unit_size(value, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB"))


def duration(seconds: float) -> Text:
    """12.3 s, 5 min 03 s, 2 h 05 min, 3 d 04 h: two units at most."""
    if not is_number(seconds):
        return UNKNOWN
    if seconds < 59.95:
        if 0 < seconds < 1:
            return Text(f"{seconds * 1000:.0f}{NARROW}ms", f"{seconds * 1000:.0f} 毫秒")
        short = f"{seconds:.1f}".removesuffix(".0")
        return Text(f"{short}{NARROW}s", f"{short} 秒")
    whole = round(seconds)
    if whole < 3600:
        return _two_units(whole // 60, "min", "分", whole % 60, "s", "秒")
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return _two_units(minutes // 60, "h", "小时", minutes % 60, "min", "分")
    hours = round(seconds / 3600)
    return _two_units(hours // 24, "d", "天", hours % 24, "h", "小时")


def energy(watt_hours: float) -> Text:
    """2.71 Wh, 1.30 kWh, 41.7 GWh."""
    if not is_number(watt_hours):
        return UNKNOWN
    size, unit, chinese = next((step for step in _ENERGY if watt_hours >= step[0]), _ENERGY[-1])
    amount = significant(watt_hours / size).en
    return Text(f"{amount}{NARROW}{unit}", f"{amount} {chinese}")


_ENERGY = ((1e9, "GWh", "吉瓦时"), (1e6, "MWh", "兆瓦时"), (1e3, "kWh", "千瓦时"), (1, "Wh", "瓦时"))


def flops_rate(value: float) -> Text:
    """Floating-point operations per second: 780 GFLOP/s."""
    if not is_number(value):
        return UNKNOWN
    return Text.same(_scaled(value, ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))) + "FLOP/s")


def moment(unix_seconds: float) -> Text:
    """A point in time, in UTC because the reader may be elsewhere."""
    if not is_number(unix_seconds):
        return UNKNOWN
    try:
        return Text.same(datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M UTC"))
    except (OverflowError, ValueError, OSError):
        return UNKNOWN


def _scaled(value: float, units: tuple[tuple[float, str], ...], *, trim: bool = False) -> str:
    for index, (size, unit) in enumerate(units):
        if abs(value) >= 0.9995 * size:
            amount = significant(value / size, 3, trim=trim).en
            if amount.lstrip(MINUS) == "1000" and index:  # rounded up into the next unit
                amount, unit = amount.replace("1000", "1" if trim else "1.00"), units[index - 1][1]
            return f"{amount}{NARROW}{unit}" if unit.isascii() else f"{amount} {unit}"
    return significant(value, 3 if value != round(value) else 6).en


def _unit_size(value: float, base: int, units: tuple[str, ...]) -> Text:
    if not is_number(value):
        return UNKNOWN
    amount, index = float(value), 0
    while abs(amount) >= 0.9995 * base and index < len(units) - 1:
        amount, index = amount / base, index + 1
    digits = exact(value).en if index == 0 else significant(amount, 3, trim=False).en
    zh = "字节" if index == 0 else units[index]
    return Text(f"{digits}{NARROW}{units[index]}", f"{digits} {zh}")


def _two_units(big: int, big_en: str, big_zh: str, small: int, small_en: str, small_zh: str) -> Text:
    return Text(
        f"{big}{NARROW}{big_en} {small:02d}{NARROW}{small_en}", f"{big} {big_zh} {small:02d} {small_zh}"
    )
