"""BTX: dense models of one origin as one mixture. Their FFNs are its experts, everything else is their mean."""

import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocte_ds.btm.partition import TOOL
from mocte_ds.checkpoints.names import EXPERT_PARAMETER, is_gate
from mocte_ds.checkpoints.source import CheckpointSource
from mocte_ds.checkpoints.weights import write_weights
from mocte_ds.config import MocteConfig
from mocte_ds.convert.hf.imported import FACTS_FILE, TAG
from mocte_ds.convert.hf.imported_folder import ImportedSource, start_state
from mocte_ds.convert.hf.output_folder import finished_folder, require_free, require_room, write_json
from mocte_ds.convert.hf.trained import quiet_transformers
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.attach import AUTO, matching_modules
from mocte_ds.moe.block import running_state
from mocte_ds.ownership.durable import replace_text
from mocte_ds.seeds import derived_seed

_STD = 0.02
"""Of the routers' first weights."""


def merge(
    checkpoints: Sequence[str | Path], out: str | Path, top_k: int = 2, seed: int = 0, modules: str = AUTO
) -> dict[str, Any]:
    """Write a start for `model.init`, whose routers are drawn by chance and learn in the run.

    Args:
        checkpoints: of dense models of one config, two or more.
        out: folder to write; appears as a whole at the end. An earlier one of this tool there is replaced.
        top_k: experts of a token. Their weights add up to 1; with one, its probability is divided by its running mean.
        seed: of the routers.
        modules: glob of the FFNs that become experts; `auto`: all.

    Returns:
        "mocte": the block that the run's DeepSpeed config needs; "experts", "blocks" and "parameters".

    Raises:
        CheckpointError: fewer than two models, other configs, models with experts or with a hashed-bigram embedding,
            or files that are missing or damaged.
        ConfigError: ``top_k`` or ``modules`` does not fit the models.
        NotOurs: ``out`` holds something else, or overlaps with a checkpoint.
    """
    if len(checkpoints) < 2:
        raise CheckpointError("one model is not a mixture; name two checkpoints or more.")
    parts = [CheckpointSource(checkpoint) for checkpoint in checkpoints]
    first = parts[0]
    for part in parts:
        if part.blocks or part.base.get("bigram") is not None:
            raise CheckpointError(f"{part.folder} is not a plain dense model; only such models are merged.")
        if any(part.base.get(key) != first.base.get(key) for key in ("architecture", "config", "dense_ffns")):
            raise CheckpointError(f"{part.folder} and {first.folder} hold models of other configs; train all with one.")
        out = require_free(Path(out), part.folder, TOOL)
    config = MocteConfig.from_dict(_block(len(parts), top_k, modules))
    names = matching_modules(first.model, config.modules)
    with quiet_transformers():
        source = ImportedSource(first.base, start_state(config, names), first.folder)
    outside = {ours: theirs for block in source.blocks for ours, theirs in block.names_outside.items()}
    for name, like in running_state(source.model).items():
        dtype = torch.float32 if like.is_floating_point() else like.dtype
        source.take(name, dtype, partial(_tensor, name, outside, parts, tuple(like.shape), seed))
    require_room(Path(out), sum(made.nbytes for made in source.made.values()))
    with finished_folder(Path(out), TOOL) as pending:
        (pending / TAG).mkdir()
        state = {**source.state, "tokenizer": first.state["tokenizer"]}
        write_weights(pending / TAG, uuid.uuid4().hex, source.model, dict(source.made), state)
        replace_text(pending / "latest", TAG)
        CheckpointSource(pending / TAG)
        facts = {
            "mocte": _block(len(parts), top_k, modules),
            "experts": len(parts),
            "blocks": len(names),
            "parameters": sum(made.numel for made in source.made.values()),
            "checkpoints": [str(part.folder) for part in parts],
        }
        write_json(pending / FACTS_FILE, facts)
    return facts


def _block(experts: int, top_k: int, modules: str) -> dict[str, Any]:
    """The "mocte" block of the mixture."""
    router = {"kind": "random", "bias": False, "weight": "softmax", "learn": True, "top_k": top_k, "std": _STD}
    router |= {"normalise": True} if top_k > 1 else {"unit_mean": True}
    return {"modules": modules, "num_experts": experts, "router": router, "freeze": {"policy": "off"}}


def _tensor(
    name: str, outside: dict[str, str], parts: Sequence[CheckpointSource], shape: tuple[int, ...], seed: int
) -> Tensor:
    """One tensor of the mixture; ``outside`` has the names of FFNs' tensors in the parts."""
    if is_gate(name):
        if name.endswith(".cluster_weight"):
            generator = torch.Generator().manual_seed(derived_seed(seed, "merge", name))
            return torch.randn(shape, generator=generator) * _STD
        # Such small routers give every expert about the same probability.
        return torch.full(shape, 1 / len(parts) if name.endswith(".cluster_mean") else 0.0)
    if found := EXPERT_PARAMETER.fullmatch(name):
        return parts[int(found[3])].read(outside[f"{found[1]}.dense.{found[4]}"])
    first = parts[0].read(name)
    if not first.is_floating_point():
        return first
    return torch.stack([first, *(part.read(name) for part in parts[1:])]).mean(dim=0)
