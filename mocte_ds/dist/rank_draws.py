"""Random numbers of one rank's own where the ranks of an axis draw alike otherwise."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from deepspeed.accelerator import get_accelerator

from mocte_ds.dist.mesh import Axis


@contextlib.contextmanager
def draws_of_rank(axis: Axis, place: str) -> Iterator[None]:
    """Context manager: what is drawn within leaves the generators as they were, and is this rank's own.

    Ranks that compute with other tokens draw other amounts of numbers; afterwards they draw alike again. The numbers
    follow from the state that is there, so that a resumed run and a recomputation draw them again.

    Args:
        axis: the ranks that draw alike before and after.
        place: in the model and the run: the state may be the same at another one where nothing else draws.
    """
    accelerator = get_accelerator()
    device = accelerator.device_name() != "cpu"
    before = torch.get_rng_state()
    on_device = accelerator.get_rng_state() if device else before
    told = on_device.numpy().tobytes() + f" {place} {axis.rank}".encode()
    seed = int.from_bytes(hashlib.blake2b(told, digest_size=6).digest())
    torch.default_generator.manual_seed(seed)
    if device:
        accelerator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
        if device:
            accelerator.set_rng_state(on_device)
