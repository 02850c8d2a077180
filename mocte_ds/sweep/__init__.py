"""Comparisons: the same run with other settings and seeds, and a table of what came out."""

from mocte_ds.sweep.launch import require_checkout, run_sweep
from mocte_ds.sweep.plan import MOST_RANKS, Arm, Sweep, read_sweep
from mocte_ds.sweep.results import RunResult, read_result
from mocte_ds.sweep.table import markdown_table
from mocte_ds.sweep.trials import trials_table

__all__ = [
    "MOST_RANKS",
    "Arm",
    "RunResult",
    "Sweep",
    "markdown_table",
    "read_result",
    "read_sweep",
    "require_checkout",
    "run_sweep",
    "trials_table",
]
