"""Figures as people read them: three significant digits, and a unit that keeps them short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NONE = "–"
MINUS = "−"


def digits(value: float, significant: int = 3) -> str:
    """`value` with `significant` digits, never in scientific notation from 0.001 to 10 million.

    >>> digits(0.01234), digits(12.345), digits(1234.5), digits(-0.5), digits(2e-5)
    ('0.0123', '12.3', '1,234', '−0.500', '2.00e−5')
    """
    magnitude = abs(float(f"{value:.{significant - 1}e}"))  # as rounded: 0.9999 is 1.00
    if magnitude and not 1e-3 <= magnitude < 1e7:
        mantissa, exponent = f"{value:.{significant - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    decimals = significant - 1
    while magnitude >= 10 and decimals:
        magnitude, decimals = magnitude / 10, decimals - 1
    while 0 < magnitude < 1:  # leading zeros behind the point are no digits
        magnitude, decimals = magnitude * 10, decimals + 1
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def seconds(value: float | None) -> str:
    """
    >>> seconds(0.0000052), seconds(0.0421), seconds(0.9999), seconds(2.37), seconds(None)
    ('5.20 µs', '42.1 ms', '1.00 s', '2.37 s', '–')
    """
    if value is None:
        return NONE
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if abs(value) >= 0.9995 * scale:
            return f"{digits(value / scale)} {unit}"
    return f"{digits(value * 1e6)} µs" if value else "0 s"


def nbytes(value: float | None) -> str:
    """
    >>> nbytes(894_000_000), nbytes(512), nbytes(None)
    ('894 MB', '512 B', '–')
    """
    if value is None:
        return NONE
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= scale:
            return f"{digits(value / scale)} {unit}"
    return f"{value:.0f} B"


def percent(value: float | None) -> str:
    """
    >>> percent(91.07), percent(-5.8), percent(None)
    ('91.1%', '−5.8%', '–')
    """
    return NONE if value is None else f"{value:.1f}%".replace("-", MINUS)


def percent_range(interval: tuple[float, float] | None) -> str:
    """
    >>> percent_range((90.96, 92.3)), percent_range((-2.0, 1.5))
    ('91.0–92.3%', '−2.0 to 1.5%')
    """
    if interval is None:
        return NONE
    between = NONE if min(interval) >= 0 else " to "  # a dash between two signs reads badly
    return f"{interval[0]:.1f}{between}{interval[1]:.1f}%".replace("-", MINUS)


def count(value: float | None) -> str:
    """A count, whole where it is whole.

    >>> count(6064), count(952.7), count(None)
    ('6,064', '952.7', '–')
    """
    if value is None:
        return NONE
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def times(value: float) -> str:
    """A factor.

    >>> times(13.81), times(140.2)
    ('13.8×', '140×')
    """
    return f"{digits(value)}×"


def plural(number: int, noun: str) -> str:
    """
    >>> plural(1, "row"), plural(0, "row")
    ('1 row', '0 rows')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


_BY_SUFFIX = {"_s": (seconds, ""), "_bytes": (nbytes, ""), "_pct": (percent, ""), "_tokens": (count, " tokens")}


def heading(key: str) -> str:
    """A field's name as a column's: without the suffix that the figures carry as their unit.

    >>> heading("dump_s"), heading("peak_memory_bytes"), heading("cached_tokens")
    ('dump', 'peak memory', 'cached tokens')
    """
    for suffix, (_, tail) in _BY_SUFFIX.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix).replace("_", " ") + tail
    return key.replace("_", " ")


def by_name(key: str, value: Any) -> str:
    """Any value, in the unit that its field's name ends in."""
    if value is None or isinstance(value, bool):
        return NONE if value is None else ("yes" if value else "no")
    if isinstance(value, (int, float)):
        for suffix, (form, _) in _BY_SUFFIX.items():
            if key.endswith(suffix):
                return form(value)
        return count(value) if isinstance(value, int) else digits(value)
    return str(value)


def between(values: Sequence[float], unit: str = "") -> str:
    """The smallest and the largest, in a sentence.

    >>> between([1.32, 1.78, 1.35], " ×")
    '1.32 to 1.78 ×'
    >>> between([0.685])
    '0.685'
    """
    ends = list(dict.fromkeys(digits(end) for end in (min(values), max(values))))
    return " to ".join(ends) + unit
