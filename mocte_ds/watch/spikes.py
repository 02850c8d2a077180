"""Losses that stand out of those before them."""

import math
from collections import deque
from statistics import median

_WINDOW, _LEAST = 32, 16  # losses that a new one is held against
_TO_DEVIATIONS = 1.4826  # of a normal distribution, from the median of absolute differences
_FLOOR = 1e-3  # nats: below it nothing is a spike


class LossSpikes:
    """Holds every loss against the median of the steps before it.

    The median and the median of absolute differences from it do not move when a spike comes among them, as a mean and
    a standard deviation would.
    """

    def __init__(self, factor: float) -> None:
        """Nothing is known yet.

        Args:
            factor: deviations above the median from which on a loss is a spike; 0: none ever is.
        """
        self._factor, self._seen = factor, deque[float](maxlen=_WINDOW)

    def see(self, loss: float) -> dict[str, float] | None:
        """What is to be logged of a loss; None: it is like the others.

        Args:
            loss: of the step, in nats per token.
        """
        found = None
        if self._factor and len(self._seen) >= _LEAST:
            middle = median(self._seen)
            spread = max(_FLOOR, _TO_DEVIATIONS * median(abs(value - middle) for value in self._seen))
            if loss - middle > self._factor * spread:
                found = {"loss": loss, "median": middle, "deviations": (loss - middle) / spread}
        if math.isfinite(loss):
            self._seen.append(loss)
        return found
