"""A checkpoint as one model in one process: for export, evaluation and inspection."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.checkpoints.load import read_plain, read_state, require_keys, resolve_tag
from mocte_ds.checkpoints.save import STATE_FILE
from mocte_ds.config import MocteConfig, parse_section
from mocte_ds.errors import CheckpointError
from mocte_ds.models.decoder import Decoder, DecoderConfig
from mocte_ds.moe.attach import attach
from mocte_ds.moe.block import Block, BlockMode

MODEL_FILE = "mp_rank_00_model_states.pt"
EXPERT_FILE = "layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"
_EXPERT_KEY = ".deepspeed_moe.experts.deepspeed_experts."


def load_model(checkpoint: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Build the decoder of a checkpoint with all its experts, in fp32, without any process group.

    Args:
        checkpoint: a folder of checkpoints (its `latest` is taken) or the folder of one tag; only read.

    Returns:
        The model in evaluation mode, blocks in the checkpoint's modes; and the state: "step", "tokens", "model",
        "mocte" (None for a dense run), "blocks", "tokenizer".

    Raises:
        CheckpointError: missing, damaged or unknown files, or a checkpoint that was not written by launch/pretrain.py.
        ConfigError: settings that this version does not know.
    """
    folder = find_tag(checkpoint)
    shared = require_keys(read_plain(folder / MODEL_FILE), ("module", "global_steps"), folder / MODEL_FILE)
    has_blocks = (folder / STATE_FILE).is_file()
    saved = read_state(folder.parent, folder.name, None, None) if has_blocks else None
    client = saved["client_state"] if saved else shared
    if "model" not in client:
        raise CheckpointError(
            f"{folder} does not say which model it holds (client_state has no 'model'); only checkpoints of "
            "launch/pretrain.py can be converted."
        )
    model = Decoder(parse_section(DecoderConfig, client["model"], "model"))
    weights = dict(shared["module"])
    state: dict[str, Any] = {"step": shared["global_steps"], "model": dict(client["model"])}
    state.update(tokenizer=client.get("tokenizer"), mocte=None, blocks=[], tokens=client.get("tokens", 0))
    if saved:
        mocte = saved["mocte"]
        _attach(model, mocte, folder)
        weights.update(read_experts(folder, model))
        state.update(mocte=mocte["config"], tokens=mocte["tokens"])
        state["blocks"] = [{key: entry[key] for key in ("name", "mode", "experts")} for entry in mocte["blocks"]]
    _fill(model, weights, folder)
    return model.float().eval(), state


def find_tag(checkpoint: str | Path) -> Path:
    """The folder of one checkpoint, from itself or from the folder of all checkpoints.

    Raises:
        CheckpointError: it is neither.
    """
    folder = Path(checkpoint).absolute()
    if (folder / MODEL_FILE).is_file():
        return folder
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; name a run's checkpoints folder, or one tag in it.")
    tag = resolve_tag(folder)
    if tag is None:
        raise CheckpointError(f"{folder} is no checkpoint: neither a file 'latest' nor {MODEL_FILE} is there.")
    return folder / tag


def read_experts(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Weights of all experts, by their global numbers.

    DeepSpeed writes one file an expert; its layer number counts the banks in the order of the model.

    Args:
        folder: of one checkpoint.
        model: with blocks; says which experts there must be.

    Raises:
        CheckpointError: a file is missing, damaged, incomplete, another expert's, or one too many.
    """
    weights: dict[str, Tensor] = {}
    known: set[str] = set()
    banks = [(block, n) for block in model.modules() if isinstance(block, Block) for n in range(len(block.banks))]
    for layer, (block, number) in enumerate(banks):
        for k, expert in enumerate(block.banks[number].local_experts):
            path = folder / EXPERT_FILE.format(layer=layer, expert=k)
            known.add(path.name)
            prefix = f"{block.name}.banks.{number}{_EXPERT_KEY}{k}."
            found = require_keys(read_plain(path), (), path)
            wrong = [key for key in found if not str(key).startswith(prefix)]
            if wrong:
                raise CheckpointError(f"{path} holds {wrong[0]}, not expert {k} of {block.name}: files were mixed up.")
            for name, parameter in expert.state_dict().items():
                value = found.get(prefix + name)
                if not torch.is_tensor(value) or value.shape != parameter.shape:
                    raise CheckpointError(
                        f"{path} does not hold {name} {tuple(parameter.shape)} of expert {k} of {block.name}."
                    )
            weights.update(found)
    strange = {path.name for path in folder.glob(EXPERT_FILE.format(layer="*", expert="*"))} - known
    if strange:
        raise CheckpointError(f"{folder} holds {min(strange)}, an expert that its {STATE_FILE} does not know.")
    return weights


def _attach(model: nn.Module, mocte: dict[str, Any], folder: Path) -> None:
    """Put the checkpoint's blocks into the model, in their modes."""
    config = MocteConfig.from_dict({**mocte["config"], "ep_size": 1})
    blocks, entries = attach(model, config), mocte["blocks"]
    names = [entry.get("name") for entry in entries]
    if names != [block.name for block in blocks]:
        raise CheckpointError(f"{folder / STATE_FILE} lists the blocks {names}, which its own config does not give.")
    for block, entry in zip(blocks, entries, strict=True):
        try:
            block.mode = BlockMode(entry["mode"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{folder / STATE_FILE}: the mode of {block.name} is unknown ({error}).") from error


def _fill(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except (RuntimeError, TypeError) as error:  # other shapes, or no tensors
        raise CheckpointError(f"{folder} does not fit its own model: {' '.join(str(error).split())[:300]}") from error
    if missing or unexpected:
        raise CheckpointError(
            f"{folder} does not fit its own model: missing {missing[:3]}, unexpected {unexpected[:3]}."
        )
