"""Numbers and settings as a reader wants them: units, few digits, a dash where nothing was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

MISSING = "\N{EN DASH}"


def is_number(value: object) -> TypeGuard[int | float]:
    """True for finite ints and floats."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: object, digits: int = 3) -> str:
    """Significant decimals for a table, a dash where there is nothing."""
    return f"{value:,.{digits}f}" if is_number(value) else MISSING


def percent(value: object) -> str:
    """A fraction of 0..1 as whole percent."""
    return f"{value:.0%}" if is_number(value) else MISSING


def change(before: object, after: object, digits: int = 3) -> str:
    """A difference with its sign, a dash where either side is missing.

    >>> change(18.3, 46.2, 1)
    '+27.9'
    """
    if not (is_number(before) and is_number(after)):
        return MISSING
    return f"{after - before:+,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def size(value: object) -> str:
    """Bytes in binary units, about three digits.

    >>> size(98_304)
    '96.0 KiB'
    """
    if not is_number(value):
        return MISSING
    if value < 1000:
        return f"{value} bytes"
    amount = value / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if amount < 1000:
            return f"{amount:.{1 if amount < 100 else 0}f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def clock(value: object) -> str:
    """Seconds as min:s, or h:min:s from one hour on.

    >>> clock(307.4)
    '5:07'
    """
    if not is_number(value):
        return MISSING
    seconds = round(value)
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names with printable values.

    >>> flat({"space": {"rank": 8, "modules": ["q", "v"]}, "eps": None})
    [('space.rank', '8'), ('space.modules', 'q, v'), ('eps', 'none')]
    """
    lines: list[tuple[str, str]] = []
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            lines += flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            lines.append((name, ", ".join(str(item) for item in value) or "none"))
        else:
            lines.append((name, "none" if value is None or value == {} else str(value)))
    return lines
