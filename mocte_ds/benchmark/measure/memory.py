"""Refuses sizes that do not fit, before anything is allocated."""

from pathlib import Path

import psutil
import torch

from mocte_ds.errors import MocteError

# A container's limit, in the second and the first version of Linux's control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    for path in map(Path, _LIMITS):
        text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        if text.isdigit():
            free = min(free, int(text) - psutil.Process().memory_info().rss)
    return free


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
