"""Refuses sizes that do not fit, before anything is allocated."""

import torch

from mocte_ds.errors import MocteError
from mocte_ds.hosts.memory import available_memory


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def require_memory(needed: float, device: torch.device, what: str, mend: str) -> dict[str, int]:
    """Stop unless ``needed`` bytes are there.

    Args:
        needed: estimate of the largest use at one time.
        device: where.
        what: the sizes, for the message.
        mend: what to do about it.

    Returns:
        The estimate and what is available, for the result.

    Raises:
        MocteError: there is less.
    """
    there = available_bytes(device)
    if needed > there:
        raise MocteError(
            f"{what} needs about {needed / 1e9:.1f} GB on {device}, and {max(there, 0) / 1e9:.1f} GB are free. {mend}"
        )
    return {"estimated_bytes": int(needed), "available_bytes": there}
