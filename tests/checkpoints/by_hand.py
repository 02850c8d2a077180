"""Checkpoints made without DeepSpeed: damaged ones whose manifest agrees, and large ones."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mocte_ds.checkpoints.load import STATE_FILE
from mocte_ds.checkpoints.names import EXPERT_FILE, MODEL_FILE
from mocte_ds.config import MocteConfig
from mocte_ds.moe import Block, BlockMode, attach
from mocte_ds.ownership.facts import hash_file
from mocte_ds.ownership.manifest import MANIFEST_FILE, Manifest


def sign(folder: Path, ranks: int = 1) -> None:
    """Make the manifest agree with the files as they are, as somebody would who knows the format."""
    files = {path.name: hash_file(path) for path in folder.iterdir() if path.name != MANIFEST_FILE}
    Manifest("by hand", 7, ranks, files).write(folder)


def write_random(folder: Path, model: nn.Module, record: dict[str, Any], settings: dict[str, Any]) -> None:
    """A checkpoint of random bf16 weights, one file at a time, so that it may be large.

    Args:
        folder: of the one tag.
        model: on the meta device; gets the blocks.
        record: what a run keeps of it, from :func:`mocte_ds.training.model.model_record`.
        settings: "mocte" block; all of its blocks have emerged.
    """
    mocte = MocteConfig.from_dict(settings)
    with torch.device("meta"):
        blocks = attach(model, mocte)
    generator = torch.Generator().manual_seed(0)

    def fill(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return torch.randint(mocte.num_experts, tensor.shape, generator=generator)
        if name.endswith("cluster_bias"):
            return torch.zeros(tensor.shape)
        noise = 0.05 * torch.randn(tensor.shape, generator=generator)
        return noise if ".gate." in name else (noise if tensor.dim() > 1 else 1 + noise).bfloat16()

    folder.mkdir(parents=True)
    state = model.state_dict()
    shared = {name: fill(name, tensor) for name, tensor in state.items() if ".deepspeed_experts." not in name}
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first[id(parameter)] != name:  # tied
            shared[name] = shared[first[id(parameter)]].clone()
    torch.save({"module": shared, "global_steps": 7}, folder / MODEL_FILE)
    banks = [(block, number) for block in blocks for number in range(len(block.banks))]
    for layer, (block, number) in enumerate(banks):
        for k in range(mocte.num_experts):
            prefix = f"{block.name}.banks.{number}.deepspeed_moe.experts.deepspeed_experts.{k}."
            weights = {name: fill(name, tensor) for name, tensor in state.items() if name.startswith(prefix)}
            torch.save(weights, folder / EXPERT_FILE.format(layer=layer, expert=k))
    modes = [{"name": b.name, "mode": BlockMode.SPECIALISING.value, "experts": _modes(b)} for b in blocks]
    saved = {"mocte": {"config": mocte.to_dict(), "blocks": modes, "tokens": 700}, "base": record.get("base")}
    torch.save({**saved, "client_state": {**record, "tokenizer": None}}, folder / STATE_FILE)
    sign(folder)


def _modes(block: Block) -> list[str]:
    return ["training"] * block.num_experts
