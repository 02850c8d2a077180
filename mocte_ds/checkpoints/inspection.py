"""Looks into a checkpoint: what is in it, how large, in which modes, and whether every file is what was saved."""

from collections import Counter
from pathlib import Path
from typing import Any

from mocte_ds.checkpoints.disk_tensors import DiskTensor, mapped, read_disk_tensors
from mocte_ds.checkpoints.load import STATE_FILE
from mocte_ds.checkpoints.manifest import problems_by_file
from mocte_ds.checkpoints.names import CONVERTERS_FILE, EXPERT_NAME, OPTIMIZER_NAME, model_file, tensor_ranks_of
from mocte_ds.checkpoints.place import find_tag, resolve_tag
from mocte_ds.checkpoints.random_states import RANDOM_NAME
from mocte_ds.checkpoints.reshaping.saved import SavedCheckpoint
from mocte_ds.checkpoints.values import only_plausible, require_keys
from mocte_ds.errors import CheckpointError
from mocte_ds.ownership.manifest import Manifest
from mocte_ds.text_table import MISSING, brief, text_table

SIZES = ("weights", "experts", "masters", "moments", "ours", "rest")
"""What the bytes of a checkpoint are: the last is file headers, DeepSpeed's facts and the run's identity."""

_STAGES_1_2 = ("single_partition_of_fp32_groups", "base_optimizer_state")


def checkpoint_facts(checkpoint: str | Path) -> dict[str, Any]:
    """Everything that there is to say about a checkpoint, also about a damaged one.

    Args:
        checkpoint: a folder of checkpoints (its `latest` is taken) or the folder of one tag; only read.

    Returns:
        "path", "latest", "run", "step", "world_size", "whole", "files" (name, kind, bytes, problem), "sizes" in bytes;
        and where the files that tell are whole "ep_size", "zero_stage", "bf16", "tokens", "blocks" (else None), and
        "weights_alone" (no engine has written it: an import).

    Raises:
        CheckpointError: no checkpoint there, or its manifest is missing or damaged.
    """
    folder = find_tag(checkpoint)
    manifest = Manifest.read(folder)
    problems = problems_by_file(folder, manifest)
    files: list[dict[str, Any]] = [
        {"name": name, "kind": _kind(name), "bytes": _size(folder / name), "problem": problem or None}
        for name, problem in problems.items()
    ]
    good = {name for name, problem in problems.items() if not problem}
    facts: dict[str, Any] = {
        "path": str(folder),
        "latest": _is_latest(folder),
        "run": manifest.run,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "whole": len(good) == len(problems),
        "ep_size": None,
        "zero_stage": None,
        "bf16": None,
        "weights_alone": False,
        "tokens": None,
        "blocks": None,
    }
    sizes = dict.fromkeys(SIZES, 0)
    with only_plausible(folder):
        if model_file(manifest.files) in good and good >= {STATE_FILE} & manifest.files.keys():
            facts.update(_told(SavedCheckpoint(folder, manifest)))
        for entry in files:
            if entry["name"] in good:
                _add_sizes(sizes, facts, folder / entry["name"], entry["kind"])
    sizes["rest"] = sum(entry["bytes"] for entry in files) - sum(sizes.values())
    return {**facts, "sizes": sizes, "files": files}


def checkpoint_text(facts: dict[str, Any]) -> str:
    """The facts as tables."""
    damaged = [entry for entry in facts["files"] if entry["problem"]]
    total = sum(entry["bytes"] for entry in facts["files"])
    precision = {True: "bf16", False: "fp32 or fp16", None: MISSING}[facts["bf16"]]
    how = [
        ("ranks", f"{facts['world_size']}, ep_size {brief(facts['ep_size'])}"),
        ("optimizer", f"ZeRO stage {brief(facts['zero_stage'])}, {precision}"),
    ]
    if facts["weights_alone"]:
        how = [("optimizer", "none: weights alone, for model.init")]
    head = [
        ("checkpoint", facts["path"] + (" (latest)" if facts["latest"] else "")),
        ("run", facts["run"]),
        ("step", brief(facts["step"])),
        ("tokens", brief(facts["tokens"])),
        *how,
        ("whole", f"no: {len(damaged)} of {len(facts['files'])} files" if damaged else "yes: every hash agrees"),
    ]
    parts = [text_table(head[0], head[1:], left=head[0])]
    rows = [[name, _mb(size), f"{100 * size / max(1, total):.1f} %"] for name, size in facts["sizes"].items()]
    parts.append(text_table(("what", "MB", "share"), [*rows, ["all", _mb(total), ""]], left=("what",)))
    if facts["blocks"]:
        rows = [
            [
                str(number),
                block["name"],
                block["mode"],
                ", ".join(f"{n} {mode}" for mode, n in block["experts"].items()),
            ]
            for number, block in enumerate(facts["blocks"])
        ]
        parts.append(text_table(("block", "name", "mode", "experts"), rows, left=("name", "mode", "experts")))
    rows = [[entry["name"], entry["kind"], _mb(entry["bytes"]), _verdict(entry)] for entry in facts["files"]]
    parts.append(text_table(("file", "kind", "MB", "verdict"), rows, left=("file", "kind", "verdict")))
    return "\n\n".join(parts)


def _verdict(entry: dict[str, Any]) -> str:
    return entry["problem"].removeprefix(f"{entry['name']} ") if entry["problem"] else "ok"


def _told(written: SavedCheckpoint) -> dict[str, Any]:
    """What the files say about the run."""
    mocte = written.state["mocte"] if written.state else None
    blocks = [
        {"name": block["name"], "mode": block["mode"], "experts": dict(Counter(block["experts"]))}
        for block in written.blocks
    ]
    alone = written.weights_alone
    tokens = mocte["tokens"] if mocte else (alone or written.model).get("tokens")
    if alone is not None:
        return {"weights_alone": True, "tokens": tokens, "blocks": blocks}
    bf16 = None if written.precision is None else bool(written.precision)
    return {"ep_size": written.layout.ep_size, "bf16": bf16, "tokens": tokens, "blocks": blocks}


def _add_sizes(sizes: dict[str, int], facts: dict[str, Any], path: Path, kind: str) -> None:
    """Count the tensors of a file."""
    if kind == "ours":
        sizes["ours"] += path.stat().st_size
    elif kind == "expert":
        sizes["experts"] += _bytes(read_disk_tensors(path))
    elif kind == "weights":
        sizes["weights"] += _bytes(require_keys(read_disk_tensors(path), ("module",), path)["module"])
    elif kind == "optimizer":
        state = require_keys(read_disk_tensors(path), ("optimizer_state_dict",), path)["optimizer_state_dict"]
        masters, moments = ("fp32_flat_groups", "optimizer_state_dict") if "fp32_flat_groups" in state else _STAGES_1_2
        facts["zero_stage"] = state.get("zero_stage")
        sizes["masters"] += _bytes(state.get(masters))
        sizes["moments"] += _bytes(state.get(moments))


def _bytes(content: Any) -> int:
    """Of all tensors in nested containers, each once."""
    found: dict[DiskTensor, int] = {}
    mapped(content, DiskTensor, lambda stored: found.setdefault(stored, stored.nbytes))
    return sum(found.values())


def _kind(name: str) -> str:
    if EXPERT_NAME.fullmatch(name):
        return "expert"
    if tensor_ranks_of([name]) > 1 or OPTIMIZER_NAME.fullmatch(name):
        return "optimizer"
    if name.endswith("_model_states.pt") and name != CONVERTERS_FILE:
        return "weights"
    return "ours" if name == STATE_FILE or RANDOM_NAME.fullmatch(name) else "other"


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _is_latest(folder: Path) -> bool:
    try:
        return resolve_tag(folder.parent) == folder.name
    except CheckpointError:
        return False


def _mb(size: int) -> str:
    return f"{size / 1e6:,.3f}"
