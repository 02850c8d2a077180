"""Clocks that wait for the device, the rates of plain matrix products and copies, and what the machine is."""

import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from mocte_ds.errors import MocteError

Result = TypeVar("Result")

_GEMM_SIZE = {"cpu": 1536, "cuda": 8192}
_COPIED = {"cpu": 1 << 24, "cuda": 1 << 28}  # fp32 numbers: more than any cache holds
_LONG = 5.0  # seconds
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Clock:
    """Times work on one device."""

    def __init__(self, device: str = "auto") -> None:
        """Choose the device.

        Args:
            device: `auto` (CUDA where there is one), `cpu` or `cuda`.

        Raises:
            MocteError: CUDA is asked for and is not there.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise MocteError("--device cuda: torch sees no CUDA device here; use --device cpu.")
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.device = torch.device(chosen)

    def synchronise(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Result], repeats: int = 3) -> tuple[float, Result]:
        """Shortest wall time of ``work``, and its last result: longer ones show what else the machine does.

        A first call, in which memory is touched and kernels are chosen, is left out; where it takes longer than a few
        seconds, that does not matter, and it is the only one.

        Args:
            work: what is timed.
            repeats: timed calls, at least 1.
        """
        first, result = self.once(work)
        if first > _LONG:
            return first, result
        times = []
        for _ in range(max(1, repeats)):
            seconds, result = self.once(work)
            times.append(seconds)
        return min(times), result

    def now(self) -> float:
        """Seconds, when the device has done all that was asked of it."""
        self.synchronise()
        return time.perf_counter()

    def once(self, work: Callable[[], Result]) -> tuple[float, Result]:
        """Wall time of one call of ``work``, and its result."""
        started = self.now()
        result = work()
        return self.now() - started, result

    def gemm_rate(self, dtype: str, size: int | None = None) -> float:
        """FLOP/s of a square matrix product in ``dtype`` (`fp32` or `bf16`), the best of five.

        Args:
            dtype: of both factors and the product.
            size: rows and columns; None: enough to fill the device.
        """
        size = size or _GEMM_SIZE[self.device.type]
        a, b = (torch.randn(size, size, device=self.device).to(_DTYPES[dtype]) for _ in range(2))
        return 2.0 * size**3 / self.seconds(lambda: a @ b, 5)[0]

    def copy_rate(self) -> float:
        """Bytes a second that a large copy reads and writes, the best of five."""
        a = torch.zeros(_COPIED[self.device.type], device=self.device)
        b = torch.empty_like(a)
        return 2.0 * a.nbytes / self.seconds(lambda: b.copy_(a), 5)[0]

    def peak_bytes(self) -> int:
        """Largest memory so far: of the process, on a CUDA device of torch."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def name(self) -> str:
        """Of the device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _cpu_name()

    def machine(self, gemm_size: int | None = None) -> dict[str, Any]:
        """What this machine is and how fast it multiplies, for the result."""
        return {
            "device": self.name(),
            "kind": self.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "gemm_flops_per_second": {name: self.gemm_rate(name, gemm_size) for name in _DTYPES},
            "copy_bytes_per_second": self.copy_rate(),
        }


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios of times that were taken in the same turns."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
