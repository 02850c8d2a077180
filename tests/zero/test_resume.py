"""A resume from every state of the partition goes on as the run that was not interrupted, bit by bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.spawn import spawn
from tests.zero.small_run import Case, Net, act, config, global_step, named_parameters

# After an emergence and freezes in one step; with all of one block frozen; with all of the model; after a thaw.
STOPS, FOLLOWING = (5, 11, 14, 18), 8


def steps(case: Case, engine: Any, first: int, last: int) -> dict[str, Any]:
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    losses = []
    for step in range(first, last):
        act(engine, step)
        # The state of every rank's random numbers is a part of the run.
        losses.append((global_step(engine, step, dtype), float(torch.rand(()))))
    weights = {name: parameter.detach().cpu().clone() for name, parameter in named_parameters(engine).items()}
    return {"losses": losses, "weights": weights, "bytes": engine.mocte.optimizer_bytes(), "rate": engine.get_lr()}


def whole(case: Case, folder: str) -> dict[str, Any]:
    """The run, saved at every stop; what it was ``FOLLOWING`` steps after the last one."""
    import mocte_ds

    torch.manual_seed(torch.distributed.get_rank())
    model = born()
    engine, *_ = mocte_ds.initialize(model=model, config=config(case))
    done, losses = 0, []
    for stop in STOPS:
        losses += steps(case, engine, done, stop)["losses"]
        engine.save_checkpoint(folder, f"step{stop}")
        done = stop
    last = steps(case, engine, done, done + FOLLOWING)
    return {**last, "losses": losses + last["losses"]}


def born() -> Net:
    """The same weights on all ranks, from whatever state their random numbers are in."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def resumed(case: Case, folder: str) -> list[dict[str, Any]]:
    """From each stop, in a new engine."""
    import mocte_ds

    results = []
    for stop in STOPS:
        engine, *_ = mocte_ds.initialize(model=born(), config=config(case))
        engine.load_checkpoint(folder, f"step{stop}")
        results.append(steps(case, engine, stop, stop + FOLLOWING))
        engine.destroy()
    return results


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 2, 2, schedule="deepspeed"),
        Case(2, 1, 1, bf16=True, schedule="deepspeed", optimizer="torch-fused"),
        Case(2, 2, 1, offload=True),
    ],
    ids=str,
)
def test_resume_is_bitwise(case: Case, tmp_path: Path) -> None:
    expected = spawn(whole, 2, case, str(tmp_path), timeout=120, deepspeed=True)
    found = spawn(resumed, 2, case, str(tmp_path), timeout=200, deepspeed=True)
    assert expected[0]["losses"] != expected[1]["losses"]
    for mine, runs in zip(expected, found, strict=True):
        for stop, run in zip(STOPS, runs, strict=True):
            assert run["losses"] == mine["losses"][stop : stop + FOLLOWING], f"resumed from step {stop}"
            assert len(run["losses"]) == FOLLOWING
        for key in ("bytes", "rate"):
            assert runs[-1][key] == mine[key]
        for name, weight in mine["weights"].items():
            assert torch.equal(runs[-1]["weights"][name], weight), name
