"""The weights of a model whose experts lie on several ranks, as one state dict or one file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from deepspeed.checkpoint.constants import AUTOTP_UNSUPPORTED_PARAMETER_PATTERNS as _UNSUPPORTED
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO as _UNIVERSAL
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from mocte_ds.checkpoints.files import put_file
from mocte_ds.checkpoints.names import EXPERT_PARAMETER, renumbered
from mocte_ds.dist.collect import tensors_on_rank_zero
from mocte_ds.dist.collectives import gather_objects
from mocte_ds.dist.mesh import Axis, Mesh
from mocte_ds.errors import CheckpointError, NotOurs
from mocte_ds.zero.cut import uncut_state_dicts
from mocte_ds.zero.partitioned_files import weights_in_state_dicts


def whole_weights(
    model: nn.Module, mesh: Mesh, partitioned: bool, exclude_frozen: bool = False
) -> dict[str, Tensor] | None:
    """Every weight and buffer of a model in its own data type, in CPU memory of rank zero (collective).

    Args:
        model: with blocks; experts of other ranks come with their numbers in the bank.
        mesh: of the run.
        partitioned: whether ZeRO stage 3 has cut the weights up.
        exclude_frozen: leave out parameters that do not train.

    Returns:
        On rank zero what `state_dict()` gives with ep_size 1, experts after everything else; None on the others.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    first = {
        f"{name}.": mesh.expert.rank * module.num_local_experts
        for name, module in model.named_modules()
        if isinstance(module, MoE)
    }
    with weights_in_state_dicts(model) if partitioned else uncut_state_dicts(model, mesh):
        # At stage 3 whole weights are there on one rank only; the others have an empty tensor.
        local = {name: tensor for name, tensor in model.state_dict().items() if not partitioned or tensor.numel()}
    shared, experts = {}, {}
    for name, tensor in local.items():
        if exclude_frozen and name in frozen:
            continue
        found = EXPERT_PARAMETER.fullmatch(name)
        if found:
            experts[renumbered(name, first[f"{found[1]}.banks.{found[2]}."])] = tensor
        else:
            shared[name] = tensor
    return tensors_on_rank_zero({**shared, **experts}, mesh.world)


def write_weights_file(path: Path, weights: dict[str, Tensor] | None, axis: Axis) -> None:
    """Write what :func:`whole_weights` has returned as one file, whole or not at all (collective).

    Args:
        path: of the file.
        weights: on the rank that writes it; None on the others.
        axis: the ranks, of which the first writes.

    Raises:
        CheckpointError: on all ranks; it could not be written, or a file lies there that this did not write.
    """
    failure = None
    if weights is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            put_file(path, weights, "save_16bit_model")
        except NotOurs as error:
            failure = str(error)
        except (OSError, RuntimeError) as error:  # the latter is what torch.save makes of a full disk
            failure = f"{type(error).__name__}: {error}. Make room or choose another folder."
    failure = gather_objects(failure, axis)[0]
    if failure:
        raise CheckpointError(f"could not write {path}: {failure}")


def require_local_is_whole(model: nn.Module, partitioned: bool, tensor_ranks: int = 1) -> None:
    """Refuse to give a rank's own state dict where it is a part of the model's.

    Args:
        model: with blocks.
        partitioned: whether ZeRO stage 3 has cut the weights up.
        tensor_ranks: ranks that each hold a part of the matrices.

    Raises:
        CheckpointError: says what gives all of it.
    """
    spread = [module for module in model.modules() if isinstance(module, MoE) and module.ep_size > 1]
    if spread or partitioned or tensor_ranks > 1:
        part = f"the experts of one of {spread[0].ep_size} ranks" if spread else "empty tensors under ZeRO stage 3"
        part = f"one of {tensor_ranks} parts of every matrix of attention" if tensor_ranks > 1 else part
        raise CheckpointError(
            f"engine.module_state_dict() would hold {part}. For all weights call engine.save_16bit_model(FOLDER) on "
            "all ranks; for a checkpoint engine.save_checkpoint(FOLDER)."
        )


@contextlib.contextmanager
def refused_by_converters(model: nn.Module) -> Iterator[None]:
    """Within it a checkpoint is written in which DeepSpeed's ds_to_universal finds that it cannot convert the experts.

    It would leave out those of all ranks but one. What it shows are a pattern of parameters and a reason, from here.
    """
    reason = "mocte_ds takes checkpoints to another number of ranks by itself when it resumes, or by tools/reshape.py"
    own = {_UNSUPPORTED: {"deepspeed_experts": reason}}
    before = getattr(model, _UNIVERSAL, None)
    setattr(model, _UNIVERSAL, {**(before or {}), **own})
    try:
        yield
    finally:
        if before is None:
            delattr(model, _UNIVERSAL)
        else:
            setattr(model, _UNIVERSAL, before)


def converters_notice() -> dict[str, str]:
    """Content of the file at which DeepSpeed's zero_to_fp32 stops."""
    return {
        "notice": "A checkpoint with experts: `mocte-ds zero_to_fp32 CHECKPOINTS OUT`, or the functions of "
        "mocte_ds.checkpoints.fp32, which have the names of DeepSpeed's."
    }
