"""Memory that is left, with control groups as a container, a scheduler and older systems have them."""

from pathlib import Path

import psutil
import pytest

from mocte_ds.hosts import memory
from mocte_ds.hosts.memory import available_memory


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def group(folder: Path, most: str, used: int, stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


def test_without_limits_it_is_the_hosts(groups: Path) -> None:
    assert available_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    (groups / "own").write_text("0::/job\n")
    group(groups / "cgroup" / "job", "max", 5)
    assert available_memory() > 1e8


def test_the_tightest_group_above_this_process_counts(groups: Path) -> None:
    (groups / "own").write_text("0::/job/step/task\n")
    group(groups / "cgroup" / "job", "5000000", 2000000)
    group(groups / "cgroup" / "job" / "step", "4000000", 3000000)
    group(groups / "cgroup" / "other", "10", 9)
    assert available_memory() == 1_000_000


def test_pages_of_files_give_way(groups: Path) -> None:
    (groups / "own").write_text("0::/\n")
    group(groups / "cgroup", "5000000", 4900000, "anon 100000\ninactive_file 4000000\nactive_file 500000\n")
    assert available_memory() == 4_600_000


def test_the_first_version(groups: Path) -> None:
    (groups / "own").write_text("5:cpu,cpuacct:/job\n4:memory:/job\n")
    folder = groups / "cgroup" / "memory" / "job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("3000000\n")
    (folder / "memory.usage_in_bytes").write_text("2500000\n")
    (folder / "memory.stat").write_text("inactive_file 7\ntotal_inactive_file 1500000\n")
    assert available_memory() == 2_000_000
