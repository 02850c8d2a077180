"""The largest memory of this process from some moment on, as the kernel counts it."""

from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Counts from its creation; getrusage's number is inherited from the process that started this one."""

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
