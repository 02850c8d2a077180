"""The latest numbers of a run as a text file for the textfile collector of Prometheus' node exporter."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mocte_ds.ownership import put

FILE = "metrics.prom"
"""In the run's folder."""
_TOOL, _APART = "pretrain", 10.0  # seconds between two versions
_HELP = {
    "step": "optimizer steps that are done",
    "tokens": "tokens that the run has trained on",
    "loss": "training loss of the last step in nats per token",
    "lr": "learning rate of the last step",
    "grad_norm": "norm of the gradient of the last step",
    "tokens_per_second": "of the last step, all ranks together",
    "mfu": "model FLOPs utilisation of the last step, as a share of one",
    "seconds": "of the last step, with validation",
    "optimizer_bytes": "of master weights and optimizer state, all ranks together",
    "slowest_rank": "the rank that worked longest in the last step",
}


class Prometheus:
    """Writes the file, in one move, so that a reader never sees half of it."""

    def __init__(self, folder: Path) -> None:
        """Nothing is written yet.

        Args:
            folder: of the run.
        """
        self._folder, self._written = folder, -math.inf

    def step(self, metrics: Mapping[str, Any], last: bool) -> None:
        """Write the numbers of a step, if the file is old enough.

        Args:
            metrics: line of metrics.jsonl.
            last: whether it is written whatever its age.

        Raises:
            OSError: it cannot be written.
        """
        if not last and time.monotonic() - self._written < _APART:
            return
        self._written = time.monotonic()
        put(self._folder, {FILE: text_of(metrics, self._folder.name).encode()}, _TOOL)


def text_of(metrics: Mapping[str, Any], run: str) -> str:
    """Prometheus' text format: https://prometheus.io/docs/instrumenting/exposition_formats/.

    Args:
        metrics: line of metrics.jsonl.
        run: name of the run, a label of every number.
    """
    label = _escaped(run)
    lines = []
    for name, meaning in _HELP.items():
        if metrics.get(name) is not None:
            lines += [f"# HELP mocte_{name} {meaning}", f"# TYPE mocte_{name} gauge"]
            lines.append(f'mocte_{name}{{run="{label}"}} {float(metrics[name])!r}')
    validation = metrics.get("validation") or {}
    if validation:
        lines.append("# HELP mocte_validation_loss of held-out text, in nats per token")
        lines.append("# TYPE mocte_validation_loss gauge")
    lines += [
        f'mocte_validation_loss{{run="{label}",domain="{_escaped(domain)}"}} {float(value)!r}'
        for domain, value in validation.items()
    ]
    lines += [
        "# HELP mocte_written_seconds when these numbers were written, since 1970",
        "# TYPE mocte_written_seconds gauge",
        f'mocte_written_seconds{{run="{label}"}} {time.time():.3f}',
    ]
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
