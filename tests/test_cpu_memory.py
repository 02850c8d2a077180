"""What a process on a CPU has freed is used again without asking the system for it."""

import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mocte_ds.cpu_memory import HUGE_PAGES, TUNABLES, keep_freed_memory, sets_thresholds
from mocte_ds.hosts.local import environment

_ROUNDS, _BYTES = 20, 48 * 2**20
_PAGES = _BYTES // resource.getpagesize()


def _faults_by_tensors() -> int:
    """Pages that the system has cleared for tensors of one size, each freed before the next, once there is room."""
    for _ in range(3):
        torch.ones(_BYTES // 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(_ROUNDS):
        torch.ones(_BYTES // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _child() -> None:
    done = keep_freed_memory()
    print(done, _faults_by_tensors())


def _run(**more: str) -> tuple[bool, int]:
    values = {name: value for name, value in os.environ.items() if name != TUNABLES and not name.startswith("MALLOC_")}
    words = [sys.executable, "-c", "from tests.test_cpu_memory import _child; _child()"]
    done, faults = subprocess.run(words, env=values | more, capture_output=True, text=True, check=True).stdout.split()
    return done == "True", int(faults)


def test_freed_memory_is_used_again() -> None:
    done, faults = _run()
    assert done and faults < _ROUNDS * _PAGES / 3
    # The system's own way, for which somebody has asked: every tensor costs all of its pages.
    done, faults = _run(MALLOC_MMAP_THRESHOLD_="131072")
    assert not done and faults > _ROUNDS * _PAGES * 2 / 3


def test_older_glibc_takes_its_largest_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {}

    def mallopt(name: int, value: int) -> int:
        fits = name != -3 or value <= 2**25
        taken.update({name: value} if fits else {})
        return int(fits)

    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    for name in (TUNABLES, "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    assert keep_freed_memory() and taken == {-3: 2**25, -1: 2**31 - 1}


@pytest.mark.parametrize(
    ("values", "sets"),
    [
        ({}, False),
        ({TUNABLES: HUGE_PAGES}, False),
        ({TUNABLES: f"{HUGE_PAGES}:glibc.malloc.trim_threshold=1"}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "1"}, True),
        ({"MALLOC_ARENA_MAX": "2"}, False),
    ],
)
def test_thresholds_of_somebody_else_stay(values: dict[str, str], sets: bool) -> None:
    assert sets_thresholds(values) is sets


def test_starts_on_a_cpu_ask_for_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mocte_ds.hosts.local.gpus", lambda: 0)
    monkeypatch.delenv(TUNABLES, raising=False)
    assert environment(2)[TUNABLES] == HUGE_PAGES
    monkeypatch.setenv(TUNABLES, "glibc.malloc.check=0")
    assert environment(2)[TUNABLES] == "glibc.malloc.check=0"
    monkeypatch.setattr("mocte_ds.hosts.local.gpus", lambda: 1)
    monkeypatch.delenv(TUNABLES)
    assert TUNABLES not in environment(2)
