"""What all tests share: a CPU, one thread a process, no network, a folder of its own for what DeepSpeed compiles."""

import functools
import gc
import os
import re
from pathlib import Path
from typing import Any

# Before anything imports torch or deepspeed; every process that a test starts inherits it.
EXTENSIONS = Path(__file__).resolve().parent.parent / ".cache" / "torch_extensions"
os.environ["TORCH_EXTENSIONS_DIR"] = str(EXTENSIONS)
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from mocte_ds.dist.cpu_op import build_cpu_op  # noqa: E402

TESTS = Path(__file__).resolve().parent
LONGEST = ("e2e", "launch", "zero", "engine", "megatron", "hf", "benchmark", "checkpoints", "report")
"""Folders of tests that take long, the longest first."""
_PROCESSES = re.compile(
    r"\bspawn\(|\bsubprocess\b|\bmultiprocessing\b|\bLauncher\b|conftest import|\brun_(processes|ranks|script)\("
)
"""In the text of a test module: it starts processes, or may."""


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known, wherever pytest's own configuration is."""
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")
    config.addinivalue_line("markers", "slow: takes seconds without a process; not among the fast")
    config.addinivalue_line("markers", "fast: neither slow nor starts a process; bash launch/test.sh --fast runs these")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as `fast` what is not `slow` and starts no process, and skip tests marked `gpu` where there is none.

    The folders whose files take minutes come first, so that workers that take a file each end together.
    """
    items.sort(key=lambda item: _place_in_order(item.path))
    for item in items:
        slow = item.get_closest_marker("slow") or "written" in getattr(item, "fixturenames", ())
        if not slow and not _starts_processes(item.path):
            item.add_marker(pytest.mark.fast)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords have the names of folders, too
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Take what is imported by now out of every later collection of garbage."""
    gc.freeze()


def _place_in_order(module: Path) -> int:
    folders = module.parts[len(TESTS.parts) :]
    return next((place for place, folder in enumerate(LONGEST) if folder in folders), len(LONGEST))


@functools.cache
def _starts_processes(module: Path) -> bool:
    return _PROCESSES.search(module.read_text(encoding="utf-8")) is not None


@pytest.fixture(scope="session")
def deepspeed_op() -> Path:
    """For tests that start DeepSpeed processes by themselves: its CPU op is built, and the folder that it lies in.

    `spawn(..., deepspeed=True)` needs no fixture.
    """
    build_cpu_op()
    return EXTENSIONS


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoints `ffn`, `lora` and `dense` of two processes: a :class:`tests.checkpoints.saved_runs.SavedRuns`."""
    from tests.checkpoints.saved_runs import write

    return write(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Every test starts from the same seed, so that none depends on the tests before it."""
    torch.manual_seed(0)
