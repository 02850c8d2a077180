"""What one finished run of a study came to."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mocte_ds.errors import ConfigError, MocteError, NonFiniteLoss
from mocte_ds.json_files import read_object
from mocte_ds.ownership.run_lock import CAUSE_FILE
from mocte_ds.report.facts import budget, fact
from mocte_ds.report.outcome import Outcome, outcome
from mocte_ds.report.reader import read_run
from mocte_ds.study.plan import PlannedRun


@dataclass(frozen=True, kw_only=True)
class RunResult(Outcome):
    """Numbers of one run and what it was made for; a run that diverged has an infinite loss."""

    loss: float
    """Mean validation loss over domains after the last step, nats per token; infinite where the run diverged."""
    optimizer_bytes: int = 0
    mean_optimizer_bytes: float = 0.0
    arm: str
    seed: int
    rate: float
    """Largest learning rate."""
    budget: float
    """Steps, as a multiple of those that are compared."""
    trial: bool
    """Whether it only served to choose the learning rate."""
    parameters: int
    """All that a model has at the end of the run."""
    active: int
    """Those that a token is computed with."""

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
    found = outcome(run)
    if found["loss"] is None and last.get("validation"):
        return _without_loss(planned, parameters)  # what is not finite is None here
    there = {
        "validation loss": found["loss"] is not None,
        "FLOPs": found["flops"] > 0,
        "bytes": found["mean_optimizer_bytes"] is not None,
    }
    missing = [name for name, known in there.items() if not known]
    if missing:
        raise MocteError(
            f"{folder} has reached its last step, but its logs have no {' and no '.join(missing)} of it: the run "
            "diverged or the logs are damaged. Remove the folder and start again."
        )
    return RunResult(
        arm=planned.arm.name,
        seed=planned.seed,
        rate=float(fact(run, "training", "learning_rate") or planned.rate or 0.0),
        budget=planned.budget,
        trial=planned.trial,
        parameters=parameters[0],
        active=parameters[1],
        **found,
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
