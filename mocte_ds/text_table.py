"""Tables of plain text for terminals, and how numbers are written in them."""

import math
from collections.abc import Collection, Sequence
from typing import Any

MISSING = "-"


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str] = ()) -> str:
    """Columns as wide as their widest cell, numbers to the right.

    Args:
        head: names of the columns.
        rows: cells, as many a row as there are columns.
        left: columns that hold words and are set to the left.
    """
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for cell, width, name in zip(line, widths, head, strict=True)
        ).rstrip()
        for line in lines
    )


def is_number(value: Any) -> bool:
    """Whether a value of a log is a finite number (true and false are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def brief(value: Any, digits: int = 3) -> str:
    """A value in a cell: whole numbers in full, others with some significant digits, ``-`` for none.

    >>> [brief(x) for x in (1234567, 0.123456, None, True, [1, 2.5])]
    ['1,234,567', '0.123', '-', 'yes', '1 2.5']
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return MISSING
        return f"{value:,.0f}" if 10**digits <= abs(value) < 1e7 else f"{value:.{digits}g}"
    if isinstance(value, list | tuple):
        return " ".join(brief(item, digits) for item in value) or MISSING
    if isinstance(value, dict):
        return " ".join(f"{key}={brief(item, digits)}" for key, item in value.items()) or MISSING
    return MISSING if value is None or value == "" else str(value)


def spread(values: Sequence[Any]) -> str:
    """Between what the numbers among ``values`` lie, ``0.12..3.4``; one number where all are equal."""
    numbers = [value for value in values if is_number(value)]
    if not numbers:
        return MISSING
    low, high = brief(min(numbers)), brief(max(numbers))
    return low if low == high else f"{low}..{high}"


def percent(share: Any) -> str:
    """A share of one as percent with three significant digits."""
    return f"{100 * share:.3g} %" if is_number(share) else MISSING
