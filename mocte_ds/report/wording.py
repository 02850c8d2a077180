"""How the report writes numbers: tokens, bytes, FLOPs, seconds, shares."""

import math
from collections.abc import Sequence

Number = int | float | None
MISSING = "–"


def integer(value: Number) -> str:
    """``1,234,567``."""
    return MISSING if value is None else f"{round(value):,}"


def decimal(value: Number, digits: int = 4) -> str:
    """A number with fixed digits, e.g. a loss."""
    return MISSING if value is None else f"{value:.{digits}f}"


def significant(value: Number, digits: int = 3) -> str:
    """A number of any size with some significant digits."""
    return MISSING if value is None else f"{value:.{digits}g}"


def flops(value: Number) -> str:
    """``1.234e+15``."""
    return MISSING if value is None else ("0" if value == 0 else f"{value:.3e}")


def percent(share: Number, digits: int = 2) -> str:
    """A share of one as percent; tiny shares are not rounded to nothing."""
    if share is None:
        return MISSING
    if 0 < abs(share) < 10 ** -(digits + 1):
        digits = 1 - math.floor(math.log10(abs(100 * share)))
    return f"{100 * share:.{digits}f} %"


def size(value: Number) -> str:
    """Bytes in a unit that fits (powers of 1000)."""
    if value is None:
        return MISSING
    factor, unit = byte_unit(value)
    return f"{value / factor:.0f} {unit}" if factor == 1 else f"{value / factor:.2f} {unit}"


def byte_unit(largest: float) -> tuple[int, str]:
    """The unit for sizes up to ``largest``: (bytes in it, its name)."""
    for factor, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if abs(largest) >= factor:
            return factor, unit
    return 1, "bytes"


def count_unit(largest: float) -> tuple[int, str]:
    """The unit for counts up to ``largest``: (its value, its name, empty for one)."""
    for factor, unit in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if abs(largest) >= 2 * factor:
            return factor, unit
    return 1, ""


def duration(seconds: Number) -> str:
    """``42.0 s``, ``12 min 5 s`` or ``3 h 20 min``."""
    if seconds is None:
        return MISSING
    if seconds < 120:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def plural(count: int, noun: str) -> str:
    """``1 block``, ``2 blocks``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def spread(values: Sequence[float]) -> str:
    """``412`` or ``240 to 332``: what all values are, or between what they lie."""
    low, high = integer(min(values)), integer(max(values))
    return low if low == high else f"{low} to {high}"


def listing(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1] if parts else ""
