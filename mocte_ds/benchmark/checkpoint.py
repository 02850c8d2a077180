"""What checkpoints cost: save, load, reshape and export in MB/s beside the disk's own, and memory beside their size."""

import argparse
import shutil
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mocte_ds.benchmark.measure.checkpoint_run import (
    CHECKPOINTS,
    TOKENIZER,
    CheckpointSizes,
    export_once,
    load,
    reshape_once,
    save,
)
from mocte_ds.benchmark.measure.clock import Clock
from mocte_ds.benchmark.measure.disk import measure_disk
from mocte_ds.benchmark.measure.memory import require_memory
from mocte_ds.benchmark.measure.options import require_at_least
from mocte_ds.checkpoints.place import find_tag
from mocte_ds.cli import seconds
from mocte_ds.config import MocteConfig
from mocte_ds.data import train_tokenizer
from mocte_ds.dist.processes import run_ranks
from mocte_ds.errors import MocteError
from mocte_ds.text_table import percent, text_table

_SIZES = {
    "d": (512, "features"),
    "width": (1408, "hidden units of an expert"),
    "layers": (2, "layers of the model, each with a block"),
    "experts": (4, "experts of a block"),
    "ep": (2, "ranks that share a block's experts"),
    "ranks": (2, "processes"),
    "micro_batch": (2, "sequences of a rank and step"),
    "context": (128, "tokens of a sequence"),
    "repeats": (2, "repetitions of everything; the shortest counts"),
}
_ON_DISK = 3  # checkpoints and plain files that lie there at one time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the run, and the disk."""
    for name, (default, what) in _SIZES.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="data type of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("."), help="folder on the disk to measure (default: this one)"
    )
    parser.add_argument(
        "--time-limit",
        type=seconds,
        default=300.0,
        help="seconds for the processes of each part (default: %(default)g)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see the module's first line. Every part runs in fresh processes.

    Raises:
        MocteError: sizes that make no sense, do not fit into memory or onto the disk, or processes that failed or took
            too long.
    """
    clock = Clock(args.device)
    sizes, kind = _read(args, clock.device), clock.device.type
    with tempfile.TemporaryDirectory(prefix="mocte-checkpoint-", dir=args.folder) as folder:
        train_tokenizer(
            {"text": ["a river moves over stone and light falls on water\n"] * 50}, Path(folder) / TOKENIZER, 288
        )

        def ranks(function: Any, number: int, *rest: Any) -> list[dict[str, Any]]:
            return run_ranks(function, number, *rest, timeout=args.time_limit, device=kind)

        beside = ranks(save, sizes.ranks, sizes, folder, True)
        shutil.rmtree(Path(folder) / CHECKPOINTS)
        waiting = ranks(save, sizes.ranks, sizes, folder, False)
        files = {path.name: path.stat().st_size for path in find_tag(Path(folder) / CHECKPOINTS).iterdir()}
        size = sum(files.values())
        disk = ranks(measure_disk, sizes.ranks, folder, size, sizes.repeats)
        loaded = ranks(load, sizes.ranks, sizes, folder)
        reshaped = ranks(reshape_once, 1, sizes, folder)
        exported = ranks(export_once, 1, sizes, folder)
    rates = _disk_rates(disk)
    parts = {
        "save": _part(_longest(waiting, "seconds"), size, rates["write"], waiting, size),
        "save beside training": _part(_longest(beside, "seconds"), size, rates["write"], beside, size)
        | _in_training(beside),
        "load": _part(_all(loaded), size, rates["read"], loaded, size),
        "reshape": _part(_all(reshaped), reshaped[0]["bytes"], rates["write"], reshaped, size) | _worked(reshaped[0]),
        "export": _part(_all(exported), exported[0]["bytes"], rates["write"], exported, size) | _worked(exported[0]),
    }
    return {
        "benchmark": "checkpoint",
        "sizes": asdict(sizes),
        "machine": {"device": clock.machine(256)["device"], "threads": torch.get_num_threads()},
        "checkpoint": {"bytes": size, "files": len(files), "parameters": sizes.parameters},
        "disk": rates,
        "exported_as": exported[0]["architecture"],
        "parts": parts,
    }


def text(numbers: dict[str, Any]) -> str:
    """For people: the disk, a table of the parts, then what a save takes from the training."""
    s, disk, beside = numbers["sizes"], numbers["disk"], numbers["parts"]["save beside training"]
    head = ["part", "MB", "seconds", "longest", "MB/s", "of the disk's", "added, MB", "kept, MB", "of the checkpoint"]
    rows = []
    for name, part in numbers["parts"].items():
        times = [f"{part['bytes'] / 1e6:,.0f}", f"{part['seconds']:.2f}", f"{max(part['times']):.2f}"]
        rates = [f"{part['bytes_per_second'] / 1e6:,.0f}", percent(part["of_disk"])]
        memory = [f"{part['memory'][kind] / 1e6:,.0f}" for kind in ("added_bytes", "kept_bytes")]
        rows.append([name, *times, *rates, *memory, percent(part["memory"]["of_checkpoint"])])
    return "\n\n".join(
        [
            f"{numbers['machine']['device']}; {s['ranks']} ranks, ep_size {s['ep']}, {s['dtype']}; "
            f"{numbers['checkpoint']['parameters']:,} parameters; {numbers['checkpoint']['files']} files of "
            f"{numbers['checkpoint']['bytes'] / 1e6:,.0f} MB",
            f"plain bytes of {s['ranks']} processes: written and synced {disk['write'] / 1e6:,.0f} MB/s, read "
            f"{disk['read'] / 1e6:,.0f} MB/s, hashed in memory {disk['sha256'] / 1e6:,.0f} MB/s",
            text_table(head, rows, left=head[:1]),
            *[
                f"{name}: {part['cpu_seconds']:.2f} s of processor time, "
                f"{part['bytes'] / part['cpu_seconds'] / 1e6:,.0f} MB for each; imports before that, "
                f"{part['start_up_seconds']:.2f} s, are not counted"
                for name, part in numbers["parts"].items()
                if "cpu_seconds" in part
            ],
            f"beside training, a save takes {beside['in_step']:.3f} s of the step; {beside['steps_beside']} steps went "
            f"on meanwhile, {beside['step_beside']:.3f} s each instead of {beside['step']:.3f} s: "
            f"{beside['delay']:.2f} s in all, and {numbers['parts']['save']['seconds']:.2f} s where training waits",
        ]
    )


def _read(args: argparse.Namespace, device: torch.device) -> CheckpointSizes:
    """Sizes of the run, checked."""
    for name in _SIZES:
        require_at_least(args, name, 1)
    if device.type == "cuda" and args.ranks > torch.cuda.device_count():
        raise MocteError(f"--ranks {args.ranks}: torch sees {torch.cuda.device_count()} CUDA devices, one per rank.")
    if not args.folder.is_dir():
        raise MocteError(f"--folder {args.folder} is not a folder.")
    sizes = CheckpointSizes(**{name: getattr(args, name) for name in _SIZES}, dtype=args.dtype)
    # Refuses a number of experts or ranks, and a model, that make no sense.
    MocteConfig.from_dict(sizes.config(False)["mocte"], sizes.ranks)
    _ = sizes.model
    # Training with fp32 gradients at their largest, and a copy of what is saved.
    what = f"a checkpoint of {sizes.estimated_bytes / 1e6:,.0f} MB"
    require_memory(3 * sizes.estimated_bytes, torch.device("cpu"), what, "Give a smaller --width or --layers.")
    needed, free = _ON_DISK * sizes.estimated_bytes, shutil.disk_usage(args.folder).free
    if needed > free:
        raise MocteError(
            f"{what} needs {needed / 1e6:,.0f} MB in {args.folder} for all parts, and {free / 1e6:,.0f} MB are free "
            "there. Give a smaller --width or --layers, or another --folder."
        )
    return sizes


def _disk_rates(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes a second of all processes together."""
    size = sum(rank["bytes"] for rank in ranks)
    return {name: size / max(rank["seconds"][name] for rank in ranks) for name in ranks[0]["seconds"]}


def _longest(ranks: list[dict[str, Any]], name: str) -> list[float]:
    """Of each save, what the slowest rank took."""
    return [max(times) for times in zip(*([entry[name] for entry in rank["saves"]] for rank in ranks), strict=True)]


def _all(ranks: list[dict[str, Any]]) -> list[float]:
    """Of each repeat, what the slowest rank took."""
    return [max(times) for times in zip(*(rank["seconds"] for rank in ranks), strict=True)]


def _part(times: list[float], size: int, disk: float, ranks: list[dict[str, Any]], checkpoint: int) -> dict[str, Any]:
    """One part: the shortest time and all of them, its rate beside the disk's, memory of all processes."""
    seconds = min(times)
    names = ("before_bytes", "peak_bytes", "added_bytes", "kept_bytes")
    memory = {name: sum(rank[name] for rank in ranks) for name in names}
    return {
        "bytes": size,
        "seconds": seconds,
        "times": times,
        "bytes_per_second": size / seconds,
        "of_disk": size / seconds / disk,
        "memory": {**memory, "of_checkpoint": memory["added_bytes"] / checkpoint},
    }


def _worked(process: dict[str, Any]) -> dict[str, float]:
    """Seconds of the processor, of the repeat that took least, and of the process before it."""
    return {"cpu_seconds": min(process["cpu_seconds"]), "start_up_seconds": process["start_up_seconds"]}


def _in_training(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What saves beside the training take from it; of the save that took least."""
    step = max(rank["step"] for rank in ranks)
    found = []
    for entry in ranks[0]["saves"]:
        times = entry["beside"]
        later = sum(times) - step * len(times)
        mean = statistics.mean(times) if times else step
        found.append((entry["in_step"] + later, entry["in_step"], len(times), mean))
    delay, in_step, steps, mean = min(found)
    return {"in_step": in_step, "steps_beside": steps, "step_beside": mean, "step": step, "delay": delay}
