"""What a run cost: sums of its ledger of FLOPs (all, what MO-CTE adds, what freezing saved), and its seconds."""

import numpy as np

from mocte_ds.report.run import Run

COMPONENTS = {
    "forward": "forward pass of the model",
    "dgrad": "backward pass: gradients by inputs",
    "wgrad": "backward pass: gradients by weights, of what trains",
    "recompute": "forward pass again, for activation checkpointing",
    "routing": "gates of the blocks",
    "sampling": "collecting features for the checks",
    "spectrum": "sampled SVD",
    "clusters": "clustering of documents",
    "trainability": "products with the experts' kernels",
    "progress": "passes over the probe set",
    "wgrad_saved": "weight gradients that frozen experts did not need: not spent",
    "prefix_saved": "backward pass through the frozen front of the model: not spent",
    "validation": "forward passes of validation: beside training",
}
SAVED = ("wgrad_saved", "prefix_saved")
BESIDE = (*SAVED, "validation", "total")
OWN_WORK = ("routing", "sampling", "spectrum", "clusters", "trainability", "progress")


def total(run: Run) -> float:
    """FLOPs that training spent, MO-CTE's own work with it; 0 without a ledger."""
    return sum(value for name, value in run.ledger.items() if name not in BESIDE)


def spent(run: Run) -> list[str]:
    """Names of the components that the total adds up."""
    known = [name for name in COMPONENTS if name in run.ledger and name not in BESIDE]
    return known + [name for name in run.ledger if name not in COMPONENTS and name not in BESIDE]


def beside(run: Run) -> list[str]:
    """Names of the components that are not part of the total."""
    found = [name for name in COMPONENTS if name in run.ledger and name in BESIDE]
    # Most runs do not freeze their front.
    return [name for name in found if name != "prefix_saved" or run.ledger[name]]


def overhead(run: Run) -> float | None:
    """Share of the spent FLOPs that MO-CTE adds (gates, sampling, SVD, clustering, trainability)."""
    return sum(run.ledger.get(name, 0.0) for name in OWN_WORK) / total(run) if total(run) else None


def share(run: Run, name: str) -> float:
    """A component over what training spent; what freezing saved over what would have been spent without it."""
    without = sum(run.ledger.get(part, 0.0) for part in SAVED) if name in SAVED else 0.0
    return run.ledger[name] / (total(run) + without)


def saved(run: Run) -> float | None:
    """FLOPs that freezing experts saved over those that the run would have spent without freezing anything."""
    return share(run, "wgrad_saved") if total(run) and "wgrad_saved" in run.ledger else None


def check_seconds(run: Run) -> dict[str, float]:
    """Seconds that all checks spent, by part; empty without checks."""
    seconds: dict[str, float] = {}
    for check in run.checks:
        for part, value in (check.get("seconds") or {}).items():
            if value is not None:
                seconds[part] = seconds.get(part, 0.0) + value
    return seconds


def wall_clock(run: Run) -> np.ndarray | None:
    """(steps,) seconds of training so far, checks and validations included; None if the log has no times."""
    seconds = [row.get("seconds") for row in run.metrics]
    if all(value is None for value in seconds):
        return None
    return np.cumsum([0.0 if value is None else value for value in seconds])


def wall_seconds(run: Run) -> float | None:
    """Seconds of training, or None if the log has no times."""
    clock = wall_clock(run)
    return None if clock is None else float(clock[-1])
