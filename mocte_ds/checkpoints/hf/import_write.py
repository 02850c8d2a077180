"""Writes the start of a run: a checkpoint of step 0 with weights and modes, but without moments, tensor by tensor."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mocte_ds.checkpoints.hf.shards import tensor_bytes
from mocte_ds.checkpoints.load import STATE_FILE
from mocte_ds.checkpoints.names import EXPERT_FILE, EXPERT_PARAMETER, MODEL_FILE, expert_parameter
from mocte_ds.checkpoints.outline import Outline, Stored
from mocte_ds.checkpoints.save import Saver
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block, BlockMode, ExpertMode

TAG = "step0"


@dataclass(frozen=True)
class Made(Stored):
    """A tensor that is made only while it is written."""

    make: Callable[[], Tensor]

    def blocks(self) -> Iterator[Any]:
        """Its bytes.

        Raises:
            CheckpointError: another shape or dtype was promised.
        """
        tensor = self.make()
        if tuple(tensor.shape) != self.shape or tensor.dtype is not self.dtype:
            raise CheckpointError(
                f"a tensor {tuple(tensor.shape)} {tensor.dtype} was promised as {self.shape} {self.dtype}."
            )
        yield tensor_bytes(tensor)


def made(like: Tensor, make: Callable[[], Tensor]) -> Made:
    """A tensor of the shape and dtype of ``like``, which needs no numbers."""
    return Made(like.dtype, tuple(like.shape), (), make)


def start_modes(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the blocks of a model whose experts train from the beginning on.

    Args:
        model: with its blocks.
        config: its "mocte" block.
    """
    blocks = [
        {
            "name": block.name,
            "mode": BlockMode.SPECIALISING.value,
            "experts": [ExpertMode.TRAINING.value] * block.num_experts,
        }
        for block in model.modules()
        if isinstance(block, Block)
    ]
    return {"config": config, "blocks": blocks, "tokens": 0}


def write_start(
    root: Path, model: nn.Module, tensors: dict[str, Stored | Tensor], mocte: dict[str, Any] | None, tokenizer: Path
) -> Path:
    """Write a checkpoint that a run starts from.

    Args:
        root: folder of checkpoints.
        model: the decoder with its blocks in their modes, without weights.
        tensors: every tensor of the model by its name.
        mocte: from :func:`start_modes`; None: a dense model.
        tokenizer: where the tokenizer will lie.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: no room on the disk, a tensor that cannot be made, or files that cannot be written.
    """
    client = {"model": asdict(model.config), "tokenizer": str(tokenizer), "tokens": 0}
    shared = {name: tensor for name, tensor in tensors.items() if not EXPERT_PARAMETER.fullmatch(name)}
    common: dict[str, Any] = {"module": shared, "global_steps": 0}
    files: dict[str, Any] = {MODEL_FILE: Outline(common if mocte else {**common, **client})}
    if mocte:
        files[STATE_FILE] = {"mocte": mocte, "client_state": client}
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    banks = [(block, number, bank) for block in blocks for number, bank in enumerate(block.banks)]
    for layer, (block, number, bank) in enumerate(banks):
        for k, expert in enumerate(bank.local_experts):
            names = [expert_parameter(block.name, number, k, name) for name in expert.state_dict()]
            content = Outline({name: tensors[name] for name in names})
            files[EXPERT_FILE.format(layer=layer, expert=k)] = content
    Saver().save(root, TAG, files, 0)
    return root / TAG
