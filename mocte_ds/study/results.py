"""What one finished run of a study came to."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mocte_ds.errors import ConfigError, MocteError, NonFiniteLoss
from mocte_ds.json_files import read_object
from mocte_ds.ownership.run_lock import CAUSE_FILE
from mocte_ds.report import ledger
from mocte_ds.report.facts import MOCTE, budget, fact
from mocte_ds.report.reader import read_run
from mocte_ds.report.run import Row, Run
from mocte_ds.report.summary import emerged_blocks, frozen_experts
from mocte_ds.study.plan import PlannedRun


@dataclass(frozen=True)
class RunResult:
    """Numbers of one run, all from its logs."""

    arm: str
    seed: int
    rate: float
    """Largest learning rate."""
    budget: float
    """Steps, as a multiple of those that are compared."""
    trial: bool
    """Whether it only served to choose the learning rate."""
    loss: float
    """Mean validation loss over domains after the last step, nats per token; infinite where the run diverged."""
    domains: dict[str, float]
    """The same by domain."""
    parameters: int
    """All that a model has at the end of the run."""
    active: int
    """Those that a token is computed with."""
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    """Everything that training spent, MO-CTE's own work with it."""
    own_flops: float = 0.0
    """MO-CTE's own part of them: gates, sampling, SVD, clusters, trainability, probe passes."""
    wgrad_saved: float = 0.0
    """FLOPs of weight gradients that frozen experts did not need."""
    optimizer_bytes: int = 0
    """Over all ranks at the last step."""
    mean_optimizer_bytes: float = 0.0
    """Over all ranks, mean over the steps."""
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
    check_seconds: float = 0.0
    curve: tuple[tuple[float, float, float, float], ...] = ()
    """Of each validation the tokens, FLOPs and seconds spent until then, and the loss."""

    @property
    def clocks(self) -> tuple[float, float, float]:
        """Tokens, FLOPs and seconds that were spent."""
        return float(self.tokens), self.flops, self.seconds

    @property
    def diverged(self) -> bool:
        """Whether its loss became NaN or infinite."""
        return not math.isfinite(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; no loss where it diverged, since JSON has no infinite numbers."""
        return {**asdict(self), "loss": None if self.diverged else self.loss}


def read_result(folder: Path, planned: PlannedRun, parameters: tuple[int, int]) -> RunResult | None:
    """Read a run's logs; None if the run is not there or not done.

    Args:
        folder: of the run.
        planned: what it was made for.
        parameters: all, and active ones.

    Raises:
        MocteError: the run is done, but its logs lack numbers.
    """
    if _diverged(folder):
        return _without_loss(planned, parameters)
    if not all((folder / name).is_file() for name in ("ledger.json", "metrics.jsonl", "run.json")):
        return None
    run = read_run(folder)
    last, steps = run.metrics[-1], budget(run)
    # The ledger is written with the last checkpoint, so a run cut off between the two has an old one.
    saved = any(event["step"] == last["step"] for event in run.of_kind("save"))
    if steps is None or last["step"] < steps or not saved:
        return None
    loss: Any = (last.get("validation") or {}).get("mean")
    sizes: list[Any] = [_sum(row.get("optimizer_bytes_by_rank")) for row in run.metrics]
    if loss is None and last.get("validation"):
        return _without_loss(planned, parameters)  # what is not finite is None here
    found = {"validation loss": loss is not None, "FLOPs": ledger.total(run) > 0, "bytes": None not in sizes}
    missing = [name for name, there in found.items() if not there]
    if missing:
        raise MocteError(
            f"{folder} has reached its last step, but its logs have no {' and no '.join(missing)} of it: the run "
            "diverged or the logs are damaged. Remove the folder and start again."
        )
    born, imbalance = emerged_blocks(run), _last_mean(run.checks, "imbalance")
    return RunResult(
        arm=planned.arm.name,
        seed=planned.seed,
        rate=float(fact(run, "training", "learning_rate") or planned.rate or 0.0),
        budget=planned.budget,
        trial=planned.trial,
        steps=last["step"],
        tokens=run.tokens,
        loss=loss,
        domains={name: value for name, value in last["validation"].items() if name != "mean" and value is not None},
        parameters=parameters[0],
        active=parameters[1],
        flops=ledger.total(run),
        own_flops=sum(run.ledger.get(name, 0.0) for name in ledger.OWN_WORK),
        wgrad_saved=run.ledger.get("wgrad_saved", 0.0),
        optimizer_bytes=sizes[-1],
        mean_optimizer_bytes=sum(sizes) / len(sizes),
        emerged=len(born),
        detected=sum(str(event.get("reason")).startswith("detected") for event in born.values()),
        frozen=len(frozen_experts(run)),
        freezes=len(run.of_kind("freeze")),
        churn=_last_mean(run.checks, "churn"),
        imbalance=imbalance if imbalance is not None else _last_step_imbalance(run),
        seconds=ledger.wall_seconds(run) or 0.0,
        check_seconds=sum(ledger.check_seconds(run).values(), 0.0),
        curve=_curve(run),
    )


def _diverged(folder: Path) -> bool:
    """Whether the last start of a run ended because a loss was not finite."""
    try:
        return read_object(folder / CAUSE_FILE).get("kind") == NonFiniteLoss.__name__
    except ConfigError:
        return False


def _without_loss(planned: PlannedRun, parameters: tuple[int, int]) -> RunResult:
    """A run that diverged: worse than any other, and nothing else of it is compared."""
    return RunResult(
        arm=planned.arm.name,
        seed=planned.seed,
        rate=planned.rate or 0.0,
        budget=planned.budget,
        trial=planned.trial,
        loss=math.inf,
        domains={},
        parameters=parameters[0],
        active=parameters[1],
    )


def _curve(run: Run) -> tuple[tuple[float, float, float, float], ...]:
    """See :attr:`RunResult.curve`; validations without all of the numbers are left out."""
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
