"""What two ranks do in the tests of saving: good and failing saves, and random states."""

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mocte_ds.checkpoints import save
from mocte_ds.checkpoints.load import restore_random_states
from mocte_ds.errors import CheckpointError


def draw() -> list[float]:
    """Some numbers from each generator, the cached second normal number of numpy among them."""
    return [random.random(), random.gauss(0, 1), *np.random.standard_normal(3), *torch.rand(3).tolist()]


def save_and_fail(folder: str) -> dict[str, Any]:
    """Save good checkpoints, one that rank 1 cannot write and one that rank 1 writes late; restore random states."""
    root, rank = Path(folder), torch.distributed.get_rank()
    latest = root / "latest"
    for tag in ("good", "blocked", "late", "aside"):
        (root / tag).mkdir(exist_ok=True)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7 + rank)
    draw()
    save.finish_checkpoint(root, "good", {"config": {}, "blocks": [], "tokens": 5}, {"note": "kept"}, True)
    result: dict[str, Any] = {"after good": latest.read_text(), "drawn": draw()}
    torch.distributed.barrier()
    if rank == 1:
        (root / "blocked" / save.RANDOM_FILE.format(rank=1)).mkdir()
    try:
        save.finish_checkpoint(root, "blocked", {}, {}, True)
    except CheckpointError as error:
        result["error"] = str(error)
    result["after blocked"] = latest.read_text()
    if rank == 1:
        write = torch.save

        def late(*arguments: Any) -> None:
            time.sleep(1.0)
            result["while rank 1 writes"] = latest.read_text()
            write(*arguments)

        torch.save = late
    save.finish_checkpoint(root, "late", {}, {}, True)
    result["after late"] = latest.read_text()
    if rank == 1:
        torch.save = write
    save.finish_checkpoint(root, "aside", {}, {}, False)
    result["after aside"] = latest.read_text()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)
    draw()
    restore_random_states(root, "good")
    result["again"] = draw()
    return result
