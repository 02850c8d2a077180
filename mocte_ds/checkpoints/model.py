"""A checkpoint as one model in one process: for export, evaluation and inspection."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.checkpoints.load import read_plain, read_state, resolve_tag
from mocte_ds.config import MocteConfig
from mocte_ds.errors import CheckpointError
from mocte_ds.models.decoder import Decoder, DecoderConfig
from mocte_ds.moe.attach import attach
from mocte_ds.moe.block import Block, BlockMode

_EXPERT_KEY = ".deepspeed_moe.experts.deepspeed_experts."


def load_model(checkpoint: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Build the decoder of a checkpoint with all its experts, in fp32, without any process group.

    Args:
        checkpoint: a folder of checkpoints (its `latest` is taken) or the folder of one tag.

    Returns:
        The model in evaluation mode, blocks in the checkpoint's modes; and the state: "step", "tokens", "model",
        "mocte" (None for a dense run), "blocks", "tokenizer", "client_state".

    Raises:
        CheckpointError: missing, damaged or unknown files, or a checkpoint that was not written by launch/pretrain.py.
    """
    folder = find_tag(checkpoint)
    shared = read_weights(folder / "mp_rank_00_model_states.pt")
    has_blocks = (folder / "mocte_state.pt").is_file()
    saved = read_state(folder.parent, folder.name, None, None) if has_blocks else None
    client = saved["client_state"] if saved else shared
    if "model" not in client:
        raise CheckpointError(
            f"{folder} does not say which model it holds (client_state has no 'model'); only checkpoints of "
            "launch/pretrain.py can be converted."
        )
    model = Decoder(DecoderConfig(**client["model"]))
    weights = dict(shared["module"])
    state: dict[str, Any] = {"format": 1, "step": shared["global_steps"], "model": dict(client["model"])}
    state.update(tokenizer=client.get("tokenizer"), mocte=None, blocks=[], tokens=client.get("tokens", 0))
    if saved:
        mocte = saved["mocte"]
        config = MocteConfig.from_dict({**mocte["config"], "ep_size": 1})
        for block, entry in zip(attach(model, config), mocte["blocks"], strict=True):
            block.mode = BlockMode(entry["mode"])
        weights.update(read_experts(folder, model))
        state.update(mocte=mocte["config"], tokens=mocte["tokens"])
        state["blocks"] = [{key: entry[key] for key in ("name", "mode", "experts")} for entry in mocte["blocks"]]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise CheckpointError(
            f"{folder} does not fit its own model: missing {missing[:3]}, unexpected {unexpected[:3]}."
        )
    return model.float().eval(), state


def find_tag(checkpoint: str | Path) -> Path:
    """The folder of one checkpoint, from itself or from the folder of all checkpoints."""
    folder = Path(checkpoint)
    if (folder / "mp_rank_00_model_states.pt").is_file():
        return folder
    tag = resolve_tag(folder) if folder.is_dir() else None
    if tag is None:
        raise CheckpointError(
            f"{folder} is no checkpoint: neither a file 'latest' nor mp_rank_00_model_states.pt is there."
        )
    return folder / tag


def read_weights(path: Path) -> dict[str, Any]:
    """A DeepSpeed file, without executing anything in it."""
    return read_plain(path)


def read_experts(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Weights of all experts, by their global numbers.

    DeepSpeed writes one file an expert; its layer number counts the banks in the order of the model.
    """
    weights: dict[str, Tensor] = {}
    layer = 0
    for block in (module for module in model.modules() if isinstance(module, Block)):
        for number, bank in enumerate(block.banks):
            for k in range(bank.num_experts):
                path = folder / f"layer_{layer}_expert_{k}_mp_rank_00_model_states.pt"
                found = read_plain(path)
                prefix = f"{block.name}.banks.{number}{_EXPERT_KEY}{k}."
                wrong = [key for key in found if not key.startswith(prefix)]
                if wrong:
                    raise CheckpointError(
                        f"{path} holds {wrong[0]}, not expert {k} of {block.name}: files were mixed up."
                    )
                weights.update({key: torch.as_tensor(value) for key, value in found.items()})
            layer += 1
    return weights
