"""Memory: sizes that do not fit are refused before anything is allocated, and a process measures its own peak."""

from pathlib import Path

import torch

from mocte_ds.errors import MocteError
from mocte_ds.hosts.memory import available_memory

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


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


class Peak:
    """The largest memory of this process since its creation, as the kernel counts it.

    getrusage's number is inherited from the process that started this one.
    """

    def __init__(self) -> None:
        _RESET.write_text("5", encoding="ascii")  # sets the largest resident set so far to the present one
        self.before = _status("VmRSS:")
        """Bytes at the start."""

    def to_dict(self) -> dict[str, int]:
        """Bytes: before, peak, added between the two, and kept, which are there still."""
        peak, now = _status("VmHWM:"), _status("VmRSS:")
        added, kept = max(0, peak - self.before), max(0, now - self.before)
        return {"before_bytes": self.before, "peak_bytes": peak, "added_bytes": added, "kept_bytes": kept}


def _status(name: str) -> int:
    lines = (line.split() for line in _STATUS.read_text(encoding="ascii").splitlines())
    return next(1024 * int(words[1]) for words in lines if words[0] == name)
