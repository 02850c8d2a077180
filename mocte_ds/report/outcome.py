"""What a run came to, in numbers: losses, what it spent on three clocks, its experts. For comparisons of runs."""

from dataclasses import dataclass
from typing import Any

from mocte_ds.report import ledger
from mocte_ds.report.facts import MOCTE, fact
from mocte_ds.report.run import Row, Run
from mocte_ds.report.summary import emerged_blocks, frozen_experts


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Numbers of one run, all from its logs, as they stand at its last step."""

    loss: float | None
    """Mean validation loss over domains, nats per token; None: the last step has no validation."""
    domains: dict[str, float]
    """The same by domain."""
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    """Everything that training spent, MO-CTE's own work with it; 0: the log does not say."""
    own_flops: float = 0.0
    """MO-CTE's own part of them: gates, sampling, SVD, clusters, trainability, probe passes."""
    wgrad_saved: float = 0.0
    """FLOPs of weight gradients that frozen experts did not need."""
    optimizer_bytes: int | None = 0
    """Over all ranks at the last step; None: the log does not say."""
    mean_optimizer_bytes: float | None = 0.0
    """Over all ranks, mean over the steps; None: the log does not say it of each."""
    emerged: int = 0
    detected: int = 0
    """Blocks whose experts emerged because clusters were found."""
    frozen: int = 0
    """Experts that are frozen at the end."""
    freezes: int = 0
    churn: float | None = None
    """Share of probe tokens, mean over blocks and banks, that go to another expert at the end than at emergence."""
    imbalance: float | None = None
    """Largest over mean load of the experts, mean over blocks and banks: of the probe tokens at the last check, or
    without a probe set of the last step's tokens."""
    seconds: float = 0.0
    """Of training; 0: the log does not say."""
    check_seconds: float = 0.0
    curve: tuple[tuple[float, float, float, float], ...] = ()
    """Of each validation the tokens, FLOPs and seconds spent until then, and the loss."""


def outcome(run: Run) -> dict[str, Any]:
    """The fields of :class:`Outcome` for a run."""
    last = run.metrics[-1]
    validated = last.get("validation") or {}
    sizes = [_sum(row.get("optimizer_bytes_by_rank")) for row in run.metrics]
    known = [size for size in sizes if size is not None]
    born, imbalance = emerged_blocks(run), _last_mean(run.checks, "imbalance")
    return {
        "loss": validated.get("mean"),
        "domains": {name: value for name, value in validated.items() if name != "mean" and value is not None},
        "steps": last["step"],
        "tokens": run.tokens,
        "flops": ledger.total(run),
        "own_flops": sum(run.ledger.get(name, 0.0) for name in ledger.OWN_WORK),
        "wgrad_saved": run.ledger.get("wgrad_saved", 0.0),
        "optimizer_bytes": sizes[-1],
        "mean_optimizer_bytes": sum(known) / len(known) if len(known) == len(sizes) else None,
        "emerged": len(born),
        "detected": sum(str(event.get("reason")).startswith("detected") for event in born.values()),
        "frozen": len(frozen_experts(run)),
        "freezes": len(run.of_kind("freeze")),
        "churn": _last_mean(run.checks, "churn"),
        "imbalance": imbalance if imbalance is not None else _last_step_imbalance(run),
        "seconds": ledger.wall_seconds(run) or 0.0,
        "check_seconds": sum(ledger.check_seconds(run).values(), 0.0),
        "curve": _curve(run),
    }


def _curve(run: Run) -> tuple[tuple[float, float, float, float], ...]:
    """See :attr:`Outcome.curve`; validations without all of the numbers are left out."""
    seconds, points = ledger.wall_clock(run), []
    for number, row in enumerate(run.metrics):
        loss = (row.get("validation") or {}).get("mean")
        numbers = [row.get("tokens"), row.get("flops"), None if seconds is None else seconds[number], loss]
        if None not in numbers:
            tokens, flops, spent, value = (float(number) for number in numbers if number is not None)
            points.append((tokens, flops, spent, value))
    return tuple(points)


def _sum(values: list[int | None] | None) -> int | None:
    known = [value for value in values or [] if value is not None]
    return sum(known) if known and len(known) == len(values or []) else None


def _last_mean(checks: list[Row], name: str) -> float | None:
    """Mean over blocks and banks of a list by bank that the last check has for each block."""
    entries = [entry.get(name) for entry in checks[-1]["blocks"]] if checks else []
    numbers = [value for entry in entries if entry for value in entry if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _last_step_imbalance(run: Run) -> float | None:
    """Largest over mean of the last step's tokens, mean over blocks and banks that have any."""
    banks = len(fact(run, *MOCTE, "banks") or [None])
    ratios = []
    for load in run.metrics[-1].get("expert_load") or []:
        each = len(load) // banks
        parts = [load[start : start + each] for start in range(0, each * banks, each)] if each else []
        ratios += [max(part) * each / sum(part) for part in parts if None not in part and sum(part)]
    return sum(ratios) / len(ratios) if ratios else None
