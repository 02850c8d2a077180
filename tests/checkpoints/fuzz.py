"""Checkpoints with one thing wrong, chosen by a seed, and what the tools may say of them: a refusal, or the truth."""

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mocte_ds.checkpoints.base import base_in_checkpoint
from mocte_ds.checkpoints.fp32 import get_fp32_state_dict_from_zero_checkpoint
from mocte_ds.checkpoints.inspection import checkpoint_facts, checkpoint_text
from mocte_ds.checkpoints.place import find_tag
from mocte_ds.checkpoints.reshaping.reshape import reshape
from mocte_ds.errors import MocteError
from mocte_ds.ownership.manifest import MANIFEST_FILE, Manifest
from tests.checkpoints.damage import seal
from tests.checkpoints.loaded import load_model

SECONDS = 30  # of CPU time for one tool on a checkpoint of some 100 kB
JUNK = (None, True, 0, -1, 10**9, 2**70, 1e300, float("nan"), "", "x", "é", b"x", [], {}, (), [[]], {"a": 1}, [10**9])
READERS: dict[str, Callable[[Path, Path], Any]] = {
    "inspect": lambda folder, _: checkpoint_text(checkpoint_facts(folder)),
    "reshape": lambda folder, out: reshape(folder, out, 1, 1),
    "reshape to more": lambda folder, out: reshape(folder, out, 4, 4),
    "model": lambda folder, _: load_model(folder),
    "sizes": lambda folder, _: base_in_checkpoint(folder),
    "fp32": lambda folder, _: get_fp32_state_dict_from_zero_checkpoint(folder),
}


def change_a_value(folder: Path, rng: random.Random) -> str:
    """Put junk into the place of a value of one file, and let the manifest agree."""
    path = rng.choice(sorted(folder.glob("*.pt")))
    content = torch.load(path, weights_only=True)
    places = list(_places(content))
    container, key = rng.choice(places)
    tensors = (torch.zeros(()), torch.zeros(3), torch.zeros(1).expand(10**9), torch.zeros(2, dtype=torch.int64))
    junk = rng.choice([*JUNK, *tensors]) if rng.random() < 0.9 else "remove"
    if isinstance(junk, str) and junk == "remove":
        container.pop(key)
    else:
        container[key] = junk
    torch.save(content, path)
    seal(folder)
    return f"{path.name} [{key!r}] = {junk if not torch.is_tensor(junk) else junk.shape!r}"


def change_the_manifest(folder: Path, rng: random.Random) -> str:
    """Put junk into the manifest, with a checksum that agrees."""
    before = Manifest.read(folder)
    values = {"run": before.run, "step": before.step, "world_size": before.world_size, "files": dict(before.files)}
    what = rng.choice(["run", "step", "world_size", "name"])
    junk = rng.choice([v for v in JUNK if not isinstance(v, bytes)])
    if what == "name":
        name = rng.choice(["../x", "/etc/passwd", "..", "", "a\0b", "x/y", "\ud800", "x" * 5000])
        values["files"][name] = rng.choice(list(before.files.values()))
        junk = name
    else:
        values[what] = junk
    Manifest(**values).write(folder)
    return f"manifest {what} = {junk!r:.60}"


def change_bytes(folder: Path, rng: random.Random) -> str:
    """Flip a bit or cut a file; the manifest knows nothing of it."""
    path = rng.choice(sorted(path for path in folder.iterdir() if path.name != MANIFEST_FILE))
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if rng.random() < 0.7:
        content[place] ^= 1 << rng.randrange(8)
    else:
        del content[place:]
    path.write_bytes(content)
    return f"{path.name} byte {place} of {len(content)}"


def fuzz(
    source: Path,
    work: Path,
    seed: int,
    count: int,
    say: Callable[[str], Any] = lambda _: None,
    readers: dict[str, Callable[[Path, Path], Any]] = READERS,
) -> list[str]:
    """Damage copies of a checkpoint and let every reader look at them.

    Args:
        source: a folder of checkpoints.
        work: where the copies lie.
        seed: of the damage.
        count: how many copies.
        say: hears of each failure.
        readers: called with the folder of checkpoints, and with a place of their own.

    Returns:
        What was not right: another error than ours, no error where bytes were changed, or no end.
    """
    rng, wrong = random.Random(seed), []
    for number in range(count):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(source, work / "in")
        change = rng.choice([change_a_value, change_a_value, change_a_value, change_the_manifest, change_bytes])
        told = change(find_tag(work / "in"), rng)
        for name, read in readers.items():
            try:
                with _limit():
                    read(work / "in", work / f"out-{name}")
                told_nothing = change is change_bytes and name in ("reshape", "fp32", "resume")
                failure = "accepted" if told_nothing else ""
            except MocteError as error:
                failure = "" if str(error).count("\n") < 2 else f"many lines: {error}"
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
            if failure:
                wrong.append(f"seed {seed} case {number}, {told}: {name}: {failure[:300]}")
                say(wrong[-1])
    return wrong


def resume(source: str, work: str, seeds: list[int], count: int) -> list[str]:
    """The same for an engine on one rank that loads them, within a process group; see :func:`fuzz`."""
    import mocte_ds
    from tests.checkpoints import runs

    engine, *_ = mocte_ds.initialize(model=runs.model(), config=runs.config(ep_size=1))
    reshape(source, Path(work) / "alone", 1, 1)

    def load(folder: Path, _: Path) -> None:
        engine.load_checkpoint(str(folder))

    load(Path(work) / "alone", Path(work))
    readers = {"resume": load}
    wrong = [
        told for seed in seeds for told in fuzz(Path(work, "alone"), Path(work, "x"), seed, count, readers=readers)
    ]
    load(Path(work) / "alone", Path(work))
    return wrong


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested dicts and lists."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(pairs)[:40]:
        yield value, key
        yield from _places(item)


@contextmanager
def _limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
