"""Bounds that stand with a field: `rows: Annotated[int, Bounds(16)] = 2048`."""

import math
from dataclasses import dataclass
from typing import Annotated

from mocte_ds.errors import ConfigError
from mocte_ds.shown import shown

LARGEST = 2**31 - 1
"""Of an integer whose field says nothing else: all that we count fits."""


@dataclass(frozen=True)
class Bounds:
    """Where a number must lie; a float must be finite whatever the bounds."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    """An open end in place of `least`."""
    below: float | None = None
    """An open end in place of `most`."""

    def check(self, value: float, where: str) -> None:
        """Raise ConfigError where ``value`` lies outside."""
        low, high = self.least, self.most
        if high is None and self.below is None and isinstance(value, int):
            high = LARGEST
        good = isinstance(value, int) or math.isfinite(value)
        good = good and (low is None or value >= low) and (high is None or value <= high)
        good = good and (self.above is None or value > self.above) and (self.below is None or value < self.below)
        if not good:
            raise ConfigError(f"{where} = {shown(value)} must {self._asked(value, high)}.")

    def _asked(self, value: float, high: float | None) -> str:
        if isinstance(value, float) and not math.isfinite(value):
            return "be a finite number"
        low = self.least
        if self.above is not None:
            return f"be greater than {self.above:g}" + (f" and at most {high:g}" if high is not None else "")
        if self.below is not None:
            return f"lie in [{low:g}, {self.below:g})"
        if isinstance(value, int):
            return f"be {low} or more" if low is not None and value < low else f"be {high} or less"
        return "not be negative" if high is None else f"lie between {low:g} and {high:g}"


ANY_INT = Bounds(-LARGEST, LARGEST)
ANY_FLOAT = Bounds()

Share = Annotated[float, Bounds(0, 1)]
"""Of a whole."""
Positive = Annotated[float, Bounds(above=0)]
NotNegative = Annotated[float, Bounds(0)]
Count = Annotated[int, Bounds(1)]
"""At least one."""
CountOrZero = Annotated[int, Bounds(0)]
Seed = Annotated[int, Bounds(0)]
"""numpy and torch take no others everywhere."""
