"""What is said of hosts that are not ready: each fault put into real ranks that believe to be on hosts of their own."""

import errno
import os
import shutil
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.plan import preflight as module
from mocte_ds.plan.preflight import PreflightError, needs_of, preflight, source_checksum
from mocte_ds.training.run_config import read_run
from tests.spawn import spawn

RANKS = 4
Usage = namedtuple("Usage", "total used free")


def _look(run_file: str, out: str, fault: str) -> tuple[str, list[str]]:
    """On two hosts of two ranks, of which the second one has a fault: what every rank is told, and what is left."""
    rank, world = dist.get_rank(), mesh_of_processes().world
    host, second = f"host{rank // 2}", rank >= 2
    module.platform.node = lambda: host
    folder = Path(out)
    if second and fault == "code":
        module.source_checksum = lambda: "0123"
    if second and fault == "version":
        found = module.version_of
        module.version_of = lambda name: "1.0" if name == "deepspeed" else found(name)
    if second and fault == "clock":
        now = time.time
        module.time.time = lambda: now() - 40.0
    if second and fault == "memory":
        module.available_memory = lambda: 1000
    if second and fault == "not shared":
        folder = folder / "elsewhere"
        folder.mkdir(exist_ok=True)
        module._SEEN_WITHIN = 0.5
    if fault == "one name":
        module.platform.node = lambda: "host"
        module.boot = lambda: f"boot{rank // 2}"
        module.available_memory = lambda: int(needs_of(read_run(Path(run_file), []), RANKS).memory * 2.5)
    if second and fault == "stale":

        def stale(_folder: Path) -> list[str]:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        module.os.listdir = stale
    if second and fault == "not there":
        folder = folder / "missing"
    if rank == 0 and fault in ("disk", "little disk"):
        needs = needs_of(read_run(Path(run_file), []), RANKS)
        free = int(needs.disk) - 1 if fault == "disk" else int(needs.disk) + 1
        module.shutil.disk_usage = lambda _folder: Usage(free, 0, free)
    if second and fault in ("sum", "exchange"):
        name = "all_reduce" if fault == "sum" else "all_to_all_single"
        right = getattr(dist, name)

        def wrong(tensor: torch.Tensor, *arguments: Any, **options: Any) -> None:
            right(tensor, *arguments, **options)
            if tensor.numel() > 1000:  # not those that ranks agree with
                tensor[4097 if fault == "exchange" else 0] += 1

        setattr(dist, name, wrong)
    try:
        said = preflight(read_run(Path(run_file), []), folder, world, torch.device("cpu"))
    except PreflightError as error:
        said = str(error)
    dist.barrier()
    return said, [path.name for path in Path(out).rglob(".preflight*")]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    values = {
        "model": {"preset": "quickstart"},
        "data": {"prepared": "data"},
        "training": {"steps": 300, "batch_tokens": 8192},
        "deepspeed": {
            "bf16": {"enabled": True},
            "mocte": {"modules": "model.layers.*.mlp", "num_experts": 4, "ep_size": 2},
        },
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


FAULTS = {
    "code": "host1: has other code of mocte_ds (0123) than host0 (",
    "version": "host1: has deepspeed 1.0, host0 has ",
    "memory": "host1: 1e-06 GB of memory are available, and its 2 ranks want ",
    "not there": "host1: cannot write to ",
    "disk": "host0: 0.0404 GB are free in the run's folder, and a checkpoint has 0.0404 GB; make room",
    "clock": "host0: its clock is 40 s ahead of that of host1; set both by NTP.",
    "sum": "host1: a sum over all ranks is wrong",
    "exchange": "host1: gets wrong numbers from host0; look at the link between them.",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_rank_is_told_which_host_has_which_fault(run_file: Path, tmp_path: Path, fault: str) -> None:
    found = spawn(_look, RANKS, str(run_file), str(tmp_path), fault, timeout=90)
    (said,) = {text for text, _ in found}
    first, *lines = said.splitlines()
    assert first == "the hosts are not ready; nothing was started:" and len(lines) == 1, said
    assert lines[0].startswith(FAULTS[fault]) and lines[0].endswith(".")
    assert [left for _, left in found] == [[]] * RANKS, "nothing stays in the folder"


def test_a_folder_that_is_not_shared(run_file: Path, tmp_path: Path) -> None:
    found = spawn(_look, RANKS, str(run_file), str(tmp_path), "not shared", timeout=90)
    (said,) = {text for text, _ in found}
    _, first, second = said.splitlines()
    assert first.startswith("host0: does not see in ") and "what host1 has written there." in first
    assert second.startswith("host1: does not see in ") and "what host0 has written there." in second
    assert [left for _, left in found] == [[]] * RANKS


def test_a_name_alone_makes_no_host(run_file: Path, tmp_path: Path) -> None:
    """Two machines of one name, neither with memory for the ranks of both, which do not share the folder."""
    found = spawn(_look, RANKS, str(run_file), str(tmp_path), "one name", timeout=90)
    (said,) = {text for text, _ in found}
    assert said.startswith("preflight: 4 ranks on 2 hosts, "), said


def test_a_rank_that_cannot_read_does_not_leave_the_others_waiting(run_file: Path, tmp_path: Path) -> None:
    found = spawn(_look, RANKS, str(run_file), str(tmp_path), "stale", timeout=90)
    (said,) = {text for text, _ in found}
    assert said.splitlines()[1:] == [f"host1: cannot read {tmp_path}: Stale file handle."]


@pytest.mark.parametrize("fault", ["none", "little disk"])
def test_hosts_that_are_ready(run_file: Path, tmp_path: Path, fault: str) -> None:
    found = spawn(_look, RANKS, str(run_file), str(tmp_path), fault, timeout=90)
    (said,) = {text for text, _ in found}
    assert said.startswith("preflight: 4 ranks on 2 hosts, ") and [left for _, left in found] == [[]] * RANKS
    assert ("2 checkpoints and a new one will take up to 0.121 GB more" in said) is (fault == "little disk"), said


def test_needs_are_those_of_the_plan(run_file: Path) -> None:
    """By hand: what the quickstart's model, and four experts for each FFN, take."""
    d, f, layers, vocab = 128, 352, 4, 2048
    ffn = layers * 3 * d * f
    trunk = 2 * vocab * d + layers * (3 * d * d + 2 * d) + d  # keys and values have half of the heads
    needs = needs_of(read_run(run_file, []), RANKS)
    tables = 2 * vocab * d
    drawn, born = tables + (trunk + ffn - tables) / layers, 2 * ffn // layers
    assert drawn > born, "two of four experts of one block on each rank take less than what is drawn in fp32"
    assert needs.memory == 2 * (trunk + ffn + drawn), "all in bf16, and as much again of what is drawn in fp32"
    assert needs.disk == (2 + 12) * (trunk + 4 * ffn) and needs.kept == 2


def test_experts_that_wait_need_no_memory_of_the_host(run_file: Path) -> None:
    """Of 64 experts of each FFN those of one block are there at a time, at stage 3 too."""
    run = read_run(run_file, [])
    run.deepspeed["mocte"]["num_experts"] = 64
    found = {}
    for stage in (2, 3):
        run.deepspeed["zero_optimization"] = {"stage": stage}
        found[stage] = needs_of(run, RANKS).memory
    d, f, layers, vocab = 128, 352, 4, 2048
    ffn = layers * 3 * d * f
    trunk = 2 * vocab * d + layers * (3 * d * d + 2 * d) + d
    assert found[2] == found[3] == 2 * (trunk + ffn + 32 * ffn // layers)


def test_a_run_that_has_saved_knows_what_a_checkpoint_takes(run_file: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "checkpoints" / f"step{number}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step{number}" / "weights.pt").write_bytes(bytes(1000 * number))
    needs, problems = needs_of(read_run(run_file, []), RANKS), list[str]()
    whole = int(needs.disk) * 3 - 3000
    for free, refused, noted in (
        (1999, True, True),
        (2000, False, True),
        (whole - 1, False, True),
        (whole, False, False),
    ):
        problems.clear()
        usage = pytest.MonkeyPatch()
        usage.setattr(module.shutil, "disk_usage", lambda _folder, free=free: Usage(free, 0, free))
        assert (bool(module._disk(problems, "host", tmp_path, needs)), bool(problems)) == (noted, refused), free
        usage.undo()


def test_other_code_has_another_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(module.__file__).parents[1]
    copy = tmp_path / "mocte_ds"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "*.gz"))
    monkeypatch.setattr(module, "__file__", str(copy / "plan" / "preflight.py"))
    assert source_checksum() == (same := source_checksum()) and len(same) == 12
    with (copy / "moe" / "gate.py").open("a") as file:
        file.write("# changed\n")
    assert source_checksum() != same
