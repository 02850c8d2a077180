"""How long each rank works in a step, and which one the others wait for."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

_WINDOW = 200  # steps


class Pace:
    """Working times of all ranks in the last steps."""

    def __init__(self) -> None:
        """No step has been seen."""
        self._rows: deque[list[float]] = deque(maxlen=_WINDOW)

    def see(self, seconds: Sequence[float]) -> dict[str, Any]:
        """Facts about a step for metrics.jsonl.

        Args:
            seconds: that each rank has worked without waiting for others.
        """
        self._rows.append([round(value, 5) for value in seconds])
        return {"rank_seconds": self._rows[-1], "slowest_rank": int(np.argmax(seconds))}

    def percentiles(self) -> dict[str, Any]:
        """Half and 95 % of the last steps of each rank took at most so long, and how often each was the slowest."""
        rows = np.asarray(self._rows)
        p50, p95 = np.percentile(rows, [50, 95], axis=0).round(5).tolist()
        slowest = np.bincount(rows.argmax(axis=1), minlength=rows.shape[1]).tolist()
        return {"rank_seconds_p50": p50, "rank_seconds_p95": p95, "slowest_of_last": slowest}
