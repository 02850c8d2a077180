"""Checkpoints under ZeRO stage 3: whole weights for those who read files, each rank's own parts for the run itself.

DeepSpeed restores what trains from the optimizer's files and what is frozen from each rank's model file; in the places
of weights it writes empty tensors. Exports and evaluation read weights, so these are put in, one module at a time.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import FROZEN_PARAM_FRAGMENTS as _FROZEN
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from mocte_ds.checkpoints.names import file_names
from mocte_ds.dist.mesh import Mesh
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.idle import freed_parameters
from mocte_ds.zero.gather import whole


def writers(model: nn.Module, sharers: int) -> list[int]:
    """For each bank of a model, which of the ranks that hold the same experts writes them.

    Args:
        model: with blocks.
        sharers: how many ranks hold the same experts.
    """
    return [writer(number, sharers) for number in range(len(_banks(model)))]


def writer(bank: int, sharers: int) -> int:
    """Which of the ranks that hold the same experts writes those of a bank: they take turns."""
    return bank % sharers


def _banks(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


@contextlib.contextmanager
def weights_in_state_dicts(model: nn.Module) -> Iterator[None]:
    """Context manager: state_dict() has all weights, on the first of the ranks that share a parameter (collective).

    They are gathered into CPU memory here: the dense ones on rank 0, experts on the rank that writes them.
    """
    copies: dict[nn.Parameter, Tensor] = {}
    numbers = {p: number for number, bank in enumerate(_banks(model)) for p in bank.deepspeed_moe.experts.parameters()}
    found, done = dict[nn.Module, dict[str, Tensor]](), freed_parameters(model)
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter not in done]
        done.update(own)  # tied ones are gathered once, by all
        with whole(own):
            for parameter in own:
                group = parameter.ds_process_group
                if dist.get_rank(group) == writer(numbers.get(parameter, 0), dist.get_world_size(group)):
                    copies[parameter] = parameter.detach().to("cpu", copy=True)
        found[module] = {name: copies[p] for name, p in module.named_parameters(recurse=False) if p in copies}
    with put_into_state_dicts(found):
        yield


@contextlib.contextmanager
def put_into_state_dicts(found: Mapping[nn.Module, Mapping[str, Tensor]]) -> Iterator[None]:
    """Context manager: state_dict() has other tensors in the places of some parameters.

    Args:
        found: by module, the tensors of its own parameters by their names in it.
    """
    hooks = [module.register_state_dict_post_hook(_puts(weights)) for module, weights in found.items() if weights]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def without_weights(
    checkpoint: Mapping[str, Any], model: nn.Module, paths: Mapping[nn.Parameter, str]
) -> dict[str, Any]:
    """A checkpoint of DeepSpeed with empty tensors for all weights, as partitioned parameters are.

    Args:
        checkpoint: the checkpoint.
        model: whose parts are freed as they are in the checkpoint.
        paths: names that DeepSpeed gives the parameters.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    module = {
        name: torch.empty(0, dtype=parameters[name].dtype) if name in parameters else value
        for name, value in checkpoint["module"].items()
    }
    # DeepSpeed restores everything that does not train from here; what is freed is in no checkpoint.
    frozen = {**(checkpoint.get(_FROZEN) or {}), **{paths[p]: p.ds_tensor.detach() for p in freed_parameters(model)}}
    return {**checkpoint, "module": module, _FROZEN: frozen}


def require_same_partition(folder: Path, stage: int, mesh: Mesh) -> None:
    """Refuse a checkpoint whose weights are partitioned in another way.

    Args:
        folder: of one tag.
        stage: of this run.
        mesh: of this run.

    Raises:
        CheckpointError: it is of stage 3 and the run is not, or the other way round, or of another number of ranks.
    """
    files = file_names(mesh.tensor.rank).partitioned_model.format(rank="*")
    parts, ranks = len(list(folder.glob(files))), mesh.data.size
    if (parts > 0) != (stage == 3):
        saved = "3" if parts else "1 or 2"
        raise CheckpointError(
            f"the checkpoint {folder} was saved under ZeRO stage {saved} and cannot be loaded under stage {stage}; set "
            "zero_optimization.stage back."
        )
    if parts and parts != ranks:
        raise CheckpointError(
            f"the checkpoint {folder} was saved by {parts} ranks under ZeRO stage 3, where DeepSpeed loads with the "
            f"same number only; this run has {ranks}."
        )


def _puts(weights: Mapping[str, Tensor]) -> Any:
    def put(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        state.update({prefix + name: weight for name, weight in weights.items()})

    return put
