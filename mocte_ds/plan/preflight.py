"""What the hosts of a run have, against what it needs, before a model is made: every fault named with its host."""

import contextlib
import hashlib
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from mocte_ds.dist.collectives import from_rank_zero, gather_objects, wait_for_all, wire_device
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import MocteError
from mocte_ds.hosts.memory import available_memory
from mocte_ds.ownership.run_lock import boot
from mocte_ds.plan.layouts import largest, layout_of, task_of
from mocte_ds.plan.memory import checkpoint, host_memory
from mocte_ds.shown import one_line
from mocte_ds.training.out_folder import CHECKPOINTS
from mocte_ds.training.run_config import RunConfig
from mocte_ds.versions import version_of

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "scikit-learn")
CLOCK_SECONDS = 30.0
"""Clocks of two hosts may differ by this much: ages of locks and heartbeats are read across hosts."""
_SEEN_WITHIN = 15.0
"""Seconds until files must be seen on all hosts; network file systems remember for a while that they were not there."""
_SUMMED = 1 << 16
_SENT = 1 << 12
"""Numbers that are summed over all ranks, and that each rank sends to each."""


class PreflightError(MocteError):
    """The hosts do not have what a run needs; says what to mend on which of them."""


@dataclass(frozen=True)
class HostFacts:
    """What one rank finds on its host."""

    host: str
    machine: str
    """What tells hosts of one name apart."""
    code: str
    """Checksum of the package's source."""
    versions: dict[str, str]
    clock: float
    """Seconds since 1970, read just after all ranks had met."""
    memory: int
    """Bytes of host memory that are available."""
    device_memory: int
    """Bytes of its GPU; 0 on a CPU."""

    @property
    def key(self) -> tuple[str, str]:
        """Of the host."""
        return self.host, self.machine


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
        ConfigError: on every rank: the run file does not fit so many ranks.
    """
    started, needs = time.monotonic(), needs_of(run, world.size)
    wait_for_all(world)
    mine = _facts(device)
    facts: list[HostFacts] = gather_objects(mine, world)
    problems, notes = _seen_by_all(out, world, facts), list[str]()
    problems += _links(world, device, [found.host for found in facts])
    if world.rank == 0:
        problems += [*_differences(facts), *_too_little_memory(facts, needs)]
        with _told(problems, mine.host, f"look at {out}"):
            notes = _scarce(facts, needs) + _disk(problems, mine.host, out, needs)
    problems = sorted({line for found in gather_objects(problems, world) for line in found})
    if problems:
        raise PreflightError("\n".join(["the hosts are not ready; nothing was started:", *problems]))
    hosts = len({found.key for found in facts})
    line = f"preflight: {world.size} ranks on {hosts} host{'s' * (hosts > 1)}, {time.monotonic() - started:.1f} s"
    return from_rank_zero("; ".join([line, *notes]), world)


@contextlib.contextmanager
def _told(problems: list[str], host: str, what: str) -> Iterator[None]:
    """Note an error of the system as a problem: a rank that stops alone leaves the others waiting."""
    try:
        yield
    except OSError as error:
        problems.append(f"{host}: cannot {what}: {error.strerror or error}.")


def _facts(device: torch.device) -> HostFacts:
    clock = time.time()
    try:
        code = source_checksum()
    except OSError as error:
        code = f"not readable: {one_line(error)}"
    return HostFacts(
        host=platform.node(),
        machine=boot(),
        code=code,
        versions={"Python": platform.python_version()} | {name: version_of(name) for name in PACKAGES},
        clock=clock,
        memory=available_memory(),
        device_memory=torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0,
    )


def source_checksum() -> str:
    """Checksum of the source files of mocte_ds, the same wherever the same code is installed."""
    package, found = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def _differences(facts: Sequence[HostFacts]) -> list[str]:
    """What is not the same for all ranks; the first one is the measure."""
    first, problems = facts[0], []
    for found in facts:
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
    late, early = max(facts, key=lambda found: found.clock), min(facts, key=lambda found: found.clock)
    if late.clock - early.clock > CLOCK_SECONDS:
        ahead = f"{late.clock - early.clock:.0f} s"
        problems.append(f"{late.host}: its clock is {ahead} ahead of that of {early.host}; set both by NTP.")
    return problems


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def _too_little_memory(facts: Sequence[HostFacts], needs: Needs) -> list[str]:
    problems = []
    for key in dict.fromkeys(found.key for found in facts):
        ranks = [found for found in facts if found.key == key]
        there, wanted = min(found.memory for found in ranks), needs.memory * len(ranks)
        if there < wanted:
            problems.append(
                f"{key[0]}: {_gb(there)} of memory are available, and its {len(ranks)} ranks want {_gb(wanted)} while "
                "they make the model; end other programs there, or start fewer ranks on a host."
            )
    return problems


def _disk(problems: list[str], host: str, out: Path, needs: Needs) -> list[str]:
    """Add to the problems if no checkpoint has room; a note where fewer have than are kept."""
    free, saved = shutil.disk_usage(out).free, _saved(out / CHECKPOINTS)
    one = max(saved) if saved else needs.disk  # a run that has saved knows better than a formula
    if free < one:
        problems.append(
            f"{host}: {_gb(free)} are free in the run's folder, and a checkpoint has {_gb(one)}; make room, or name "
            "another --out."
        )
    wanted = needs.disk * (needs.kept + 1) - sum(saved)
    if free < wanted:
        return [f"{_gb(free)} are free, and {needs.kept} checkpoints and a new one will take up to {_gb(wanted)} more"]
    return []


def _saved(folder: Path) -> list[int]:
    """Bytes of each checkpoint that is there."""
    found = []
    for place in folder.iterdir() if folder.is_dir() else ():
        if place.is_dir():
            found.append(sum(path.stat().st_size for path in place.rglob("*") if path.is_file()))
    return found


def _scarce(facts: Sequence[HostFacts], needs: Needs) -> list[str]:
    """GPUs that may not suffice, for the log."""
    smallest = min(facts, key=lambda found: found.device_memory)
    if not smallest.device_memory or smallest.device_memory >= needs.device_memory:
        return []
    return [
        f"a GPU of {smallest.host} has {_gb(smallest.device_memory)}, and the plan is {_gb(needs.device_memory)} "
        "(tools/plan.py)"
    ]


def _seen_by_all(out: Path, world: Axis, facts: Sequence[HostFacts]) -> list[str]:
    """Write a file on every host, and look for all of them on every host (collective).

    Each rank returns what it has found; the files are removed.
    """
    token, mine = from_rank_zero(secrets.token_hex(8), world), facts[world.rank]
    first_of = {found.key: rank for rank, found in reversed(list(enumerate(facts)))}
    files = {rank: out / f".preflight-{token}-{rank}" for rank in first_of.values()}
    problems: list[str] = []
    share = "All hosts must share the run's folder, by the same path."
    try:
        if world.rank in files:
            with _told(problems, mine.host, f"write to {out} ({share[:-1]})"):
                files[world.rank].write_text(mine.host, encoding="utf-8")
        if any(gather_objects(problems, world)):
            return problems
        if world.rank in files:
            with _told(problems, mine.host, f"read {out}"):
                missing = _missing(files)
                if missing:
                    problems.append(
                        f"{mine.host}: does not see in {out} what {facts[missing[0]].host} has written there. {share}"
                    )
        wait_for_all(world)
        return problems
    finally:
        if world.rank in files:
            with contextlib.suppress(OSError):
                files[world.rank].unlink(missing_ok=True)


def _missing(files: Mapping[int, Path]) -> list[int]:
    """Ranks whose file does not appear in time."""
    until = time.monotonic() + _SEEN_WITHIN
    while True:
        os.listdir(next(iter(files.values())).parent)  # makes a network file system look again
        missing = [rank for rank, path in files.items() if not path.exists()]
        if not missing or time.monotonic() > until:
            return missing
        time.sleep(0.2)


def _links(world: Axis, device: torch.device, hosts: Sequence[str]) -> list[str]:
    """Whether a sum over all ranks, and an exchange between each two of them, come out right (collective)."""
    if world.size == 1:
        return []
    on = wire_device(device, world)
    numbers = torch.arange(_SUMMED, device=on) + world.rank
    total = numbers.clone()
    dist.all_reduce(total, group=world.group)
    ranks = world.size
    wanted = ranks * torch.arange(_SUMMED, device=on) + ranks * (ranks - 1) // 2
    problems = []
    if not torch.equal(total, wanted):
        problems.append(f"{hosts[world.rank]}: a sum over all ranks is wrong; look at its network and its memory.")
    sent = (world.rank * ranks + torch.arange(ranks, device=on)).repeat_interleave(_SENT)
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=world.group)
    right = (torch.arange(ranks, device=on) * ranks + world.rank).repeat_interleave(_SENT)
    wrong = (got != right).reshape(ranks, _SENT).any(dim=1).nonzero().flatten().tolist()
    problems += [
        f"{hosts[world.rank]}: gets wrong numbers from {hosts[rank]}; look at the link between them." for rank in wrong
    ]
    return problems
