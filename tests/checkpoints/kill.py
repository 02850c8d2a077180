"""A tiny run on two ranks that one of them leaves by SIGKILL, at a named moment of a step or of a save."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mocte_ds.checkpoints import files, place, save
from mocte_ds.zero.checkpoint_files import CheckpointFiles
from tests.engine import runs

STEPS, EVERY = 24, 2


@dataclass(frozen=True)
class Moment:
    """When a rank dies."""

    step: int
    """The step in which, or after which, it dies."""
    phase: str
    """A key of PHASES."""
    rank: int


# Name -> object, attribute, calls that still go well, whether only rank zero comes by. In a training phase the step is
# under way; in a phase of a save it is done.
IN_STEP: dict[str, tuple[Any, str, int, bool]] = {
    "forward": (torch.nn.functional, "silu", 1, False),
    "backward": (torch.Tensor, "backward", 1, False),
    "optimizer": (torch.optim.AdamW, "step", 0, False),
}
IN_SAVE: dict[str, tuple[Any, str, int, bool]] = {
    "DeepSpeed collects": (CheckpointFiles, "save", 1, False),
    "inside a file": (files.Hashed, "write", 9, False),
    "between files": (save, "write_file", 1, False),
    "hashes are told": (save, "show_text", 0, False),
    "before the manifest": (save.Manifest, "write", 0, True),
    "before the rename": (place.Place, "swap_in", 0, True),
    "before latest": (place.Place, "move_latest", 0, True),
}


def run(folder: str, moment: Moment | None, asynchronous: bool, saving: bool = True) -> dict[str, Any]:
    """Go on from the last checkpoint to the end, or to the moment; losses go into `losses_RANK.jsonl`.

    Returns:
        What the end of the run shows: modes of the experts, tokens they got, and random numbers.
    """
    import mocte_ds

    settings = runs.config(
        checkpoint={"async_save": asynchronous},
        total_steps=STEPS,
        check_every=0.1,
        freeze={"policy": "random", "checks": 1, "after_checks": 2, "rows": 32, "iterations": 4},
    )
    engine, *_ = mocte_ds.initialize(model=runs.model(), config=settings)
    checkpoints = Path(folder) / "checkpoints"
    engine.load_checkpoint(str(checkpoints))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    progress = {"step": engine.global_steps, "saving": False}
    if moment and moment.rank == rank:
        _arm(moment, progress)
    with open(Path(folder) / f"losses_{rank}.jsonl", "a", encoding="utf-8", buffering=1) as log:
        for step in range(engine.global_steps + 1, STEPS + 1):
            progress.update(step=step, saving=False)
            for turn in range(2):
                ids, domain = runs.batch(step, turn * world + rank)
                engine.mocte.annotate(domain, ["low", "high"])
                loss = engine(input_ids=ids, labels=ids).loss
                engine.backward(loss)
                engine.step()
                print(json.dumps([step, turn, loss.item().hex()]), file=log)
            if saving and step % EVERY == 0:
                progress["saving"] = True
                engine.save_checkpoint(str(checkpoints), f"step{step}")
    engine.wait_for_checkpoint()
    modes = [[str(expert.mode) for expert in block.experts] for block in engine.mocte.blocks]
    return {"modes": modes, "load": engine.mocte.expert_load(), "random": torch.rand(2).tolist()}


def _arm(moment: Moment, progress: dict[str, Any]) -> None:
    """Put the end of this process in front of a function."""
    in_save = moment.phase in IN_SAVE
    owner, name, spared, _ = {**IN_STEP, **IN_SAVE}[moment.phase]
    original: Callable[..., Any] = getattr(owner, name)
    calls = {"left": spared}

    def or_die(*args: Any, **kwargs: Any) -> Any:
        # The thread of a save may come by when the next step is under way.
        there = progress["saving"] or progress["step"] > moment.step if in_save else not progress["saving"]
        if progress["step"] >= moment.step and there:
            if calls["left"] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            calls["left"] -= 1
        return original(*args, **kwargs)

    setattr(owner, name, or_die)
