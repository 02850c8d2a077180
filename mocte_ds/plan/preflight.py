"""What the hosts of a run have, against what it needs, before a model is made: every fault named with its host."""

import hashlib
import importlib.metadata
import os
import platform
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import torch
import torch.distributed as dist

from mocte_ds.dist.collectives import from_rank_zero, gather_objects, wait_for_all, wire_device
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import MocteError
from mocte_ds.plan.layouts import largest, layout_of, task_of
from mocte_ds.plan.memory import checkpoint, host_memory
from mocte_ds.training.run_config import RunConfig

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "scikit-learn")
CLOCK_SECONDS = 30.0
"""Clocks may differ by this much: ages of locks and heartbeats are read across hosts."""
_SEEN_WITHIN = 15.0
"""Seconds until a file must be seen on all hosts; network file systems remember for a while that it was not there."""
_ROUTE_NUMBERS = 1 << 16
_CGROUP = Path("/sys/fs/cgroup")


class PreflightError(MocteError):
    """The hosts do not have what a run needs; says what to mend on which of them."""


@dataclass(frozen=True)
class HostFacts:
    """What one rank finds on its host."""

    host: str
    code: str
    """Checksum of the package's source."""
    versions: dict[str, str]
    clock: float
    """Seconds since 1970, read just after all ranks had met."""
    memory: int
    """Bytes of host memory that are available."""
    devices: int
    """GPUs that this rank sees; 0 on a CPU."""
    device_memory: int
    """Bytes of its GPU; 0 on a CPU."""
    local_rank: int


@dataclass(frozen=True)
class Needs:
    """What a run needs."""

    memory: float
    """Bytes of host memory for each rank, while it makes the model."""
    disk: float
    """Bytes of the largest checkpoint."""
    kept: int
    """Checkpoints that are kept."""
    device_memory: float
    """Bytes of a GPU at the most, computed from formulas with assumed parts."""


def needs_of(run: RunConfig, ranks: int) -> Needs:
    """What a run of so many ranks needs, by the formulas of tools/plan.py."""
    task, layout = task_of(run), layout_of(run, ranks)
    memory = host_memory(task, layout, 1)
    return Needs(memory, checkpoint(task, True), run.training.keep_checkpoints, largest(task, layout)[1])


def preflight(run: RunConfig, out: Path, world: Axis, device: torch.device) -> str:
    """Look at all hosts and at the links between them (collective).

    Args:
        run: the run file.
        out: the run's folder, which is there on the first rank's host.
        world: all ranks.
        device: on which this rank will train.

    Returns:
        One line for the log.

    Raises:
        PreflightError: on every rank; one line for each fault, with its host and what to do.
    """
    started = time.monotonic()
    wait_for_all(world)
    facts = gather_objects(_facts(device), world)
    problems = _seen_by_all(out, world, facts)
    links = _links(world, device, [found.host for found in facts])
    notes: list[str] = []
    if world.rank == 0:
        needs = needs_of(run, world.size)
        problems = [*_differences(facts), *problems, *_too_little(facts, needs, shutil.disk_usage(out).free)]
        notes = _scarce(facts, needs, shutil.disk_usage(out).free)
    problems = sorted({line for found in gather_objects([*problems, *links], world) for line in found})
    if problems:
        raise PreflightError("\n".join(["the hosts are not ready; nothing was started:", *problems]))
    hosts = len({found.host for found in facts})
    line = f"preflight: {world.size} ranks on {hosts} host{'s' * (hosts > 1)}, {time.monotonic() - started:.1f} s"
    return from_rank_zero("; ".join([line, *notes]), world)


def _facts(device: torch.device) -> HostFacts:
    clock = time.time()
    cuda = device.type == "cuda"
    return HostFacts(
        host=platform.node(),
        code=source_checksum(),
        versions={"Python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        clock=clock,
        memory=available_memory(),
        devices=torch.cuda.device_count() if cuda else 0,
        device_memory=torch.cuda.mem_get_info(device)[1] if cuda else 0,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )


def source_checksum() -> str:
    """Checksum of the source files of mocte_ds, the same wherever the same code is installed."""
    package, found = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def available_memory() -> int:
    """Bytes that processes can still have: of the host, or of the control group that a scheduler has put them into."""
    found = [psutil.virtual_memory().available]
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            found.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass  # no control groups of version 2: the host's own number holds
    return min(found)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _differences(facts: Sequence[HostFacts]) -> list[str]:
    """What is not the same on all hosts; the first rank's host is the measure, for the clock the median."""
    first, middle, problems = facts[0], median(found.clock for found in facts), []
    for found in {found.host: found for found in facts}.values():
        if found.code != first.code:
            problems.append(
                f"{found.host}: has other code of mocte_ds ({found.code}) than {first.host} ({first.code}); install or "
                "check out the same version."
            )
        for name, version in found.versions.items():
            if version != first.versions[name]:
                problems.append(
                    f"{found.host}: has {name} {version}, {first.host} has {first.versions[name]}; install the same."
                )
        if abs(found.clock - middle) > CLOCK_SECONDS:
            problems.append(f"{found.host}: its clock is {found.clock - middle:+.0f} s off; set it by NTP.")
    for rank, found in enumerate(facts):
        if found.device_memory and found.local_rank >= found.devices:
            problems.append(f"{found.host}: has {found.devices} GPUs, and rank {rank} wants number {found.local_rank}.")
    return problems


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _too_little(facts: Sequence[HostFacts], needs: Needs, free: int) -> list[str]:
    """Memory of hosts and room on the disk that do not suffice."""
    problems = []
    for host in dict.fromkeys(found.host for found in facts):
        ranks = [found for found in facts if found.host == host]
        there, wanted = min(found.memory for found in ranks), needs.memory * len(ranks)
        if there < wanted:
            problems.append(
                f"{host}: {_gb(there)} of memory are available, and its {len(ranks)} ranks want "
                f"{_gb(wanted)} while they make the model; end other programs there, or start fewer ranks on a host."
            )
    if free < needs.disk:
        problems.append(
            f"{facts[0].host}: {_gb(free)} are free in the run's folder, and a checkpoint has "
            f"{_gb(needs.disk)}; make room, or name another --out."
        )
    return problems


def _scarce(facts: Sequence[HostFacts], needs: Needs, free: int) -> list[str]:
    """What may not suffice, for the log."""
    notes = []
    kept = needs.disk * (needs.kept + 1)
    if free < kept:
        notes.append(f"{_gb(free)} are free, and {needs.kept} checkpoints and a new one have {_gb(kept)}")
    smallest = min(facts, key=lambda found: found.device_memory)
    if smallest.device_memory and smallest.device_memory < needs.device_memory:
        notes.append(
            f"a GPU of {smallest.host} has {_gb(smallest.device_memory)}, and the plan is "
            f"{_gb(needs.device_memory)} (tools/plan.py)"
        )
    return notes


def _seen_by_all(out: Path, world: Axis, facts: Sequence[HostFacts]) -> list[str]:
    """Write a file on every host, and look for all of them on every host (collective).

    Each rank returns what it has found; the files are removed.
    """
    token = from_rank_zero(secrets.token_hex(8), world)
    writers = [rank for rank in range(world.size) if facts[rank].host not in {f.host for f in facts[:rank]}]
    mine, problem = out / f".preflight-{token}-{world.rank}", []
    try:
        if world.rank in writers:
            try:
                mine.write_text(facts[world.rank].host, encoding="utf-8")
            except OSError as error:
                problem.append(
                    f"{facts[world.rank].host}: cannot write to {out}: {error.strerror or error}. All hosts must share "
                    "the run's folder, by the same path."
                )
        if any(gather_objects(problem, world)):
            return problem
        if world.rank in writers:
            missing = [rank for rank in writers if not _appears(out / f".preflight-{token}-{rank}")]
            if missing:
                problem.append(
                    f"{facts[world.rank].host}: does not see in {out} what {facts[missing[0]].host} has written there. "
                    "All hosts must share the run's folder, by the same path."
                )
        wait_for_all(world)
        return problem
    finally:
        mine.unlink(missing_ok=True)


def _appears(path: Path) -> bool:
    until = time.monotonic() + _SEEN_WITHIN
    while True:
        os.listdir(path.parent)  # makes a network file system look again
        if path.exists():
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)


def _links(world: Axis, device: torch.device, hosts: Sequence[str]) -> list[str]:
    """Whether a sum over all ranks, and an exchange between each two of them, come out right (collective)."""
    if world.size == 1:
        return []
    on = wire_device(device, world)
    numbers = torch.arange(_ROUTE_NUMBERS, device=on) + world.rank
    total = numbers.clone()
    dist.all_reduce(total, group=world.group)
    ranks = world.size
    wanted = ranks * torch.arange(_ROUTE_NUMBERS, device=on) + ranks * (ranks - 1) // 2
    problems = []
    if not torch.equal(total, wanted):
        problems.append(f"{hosts[world.rank]}: a sum over all ranks is wrong; look at its network and its memory.")
    each = _ROUTE_NUMBERS // 16
    sent = (world.rank * ranks + torch.arange(ranks, device=on)).repeat_interleave(each)
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=world.group)
    right = (torch.arange(ranks, device=on) * ranks + world.rank).repeat_interleave(each)
    wrong = (got != right).reshape(ranks, each).any(dim=1).nonzero().flatten().tolist()
    problems += [
        f"{hosts[world.rank]}: gets wrong numbers from {hosts[rank]}; look at the link between them." for rank in wrong
    ]
    return problems
