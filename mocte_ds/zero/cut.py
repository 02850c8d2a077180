"""Tensor parallelism by DeepSpeed's AutoTP: matrices outside of the blocks are cut over the ranks of a tensor group.

AutoTP takes the plan that a class of transformers brings (`base_model_tp_plan`). What lies in a block stays whole on
every rank: the dense FFN, the gates and the experts, which expert parallelism spreads over the same ranks.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.module_inject.layers import DS_TENSOR_MODEL_PARALLEL
from torch import Tensor, nn

from mocte_ds.dist.collectives import from_rank_zero, gather_rows
from mocte_ds.dist.mesh import Axis, Mesh
from mocte_ds.errors import ConfigError
from mocte_ds.moe.block import Block
from mocte_ds.zero.partitioned_files import put_into_state_dicts

_META = "ds_autotp_universal_checkpoint_meta"
"""Attribute of a parameter that says how AutoTP has cut it: DeepSpeed's DS_AUTOTP_UC_META."""
_UNCUT = "mocte_uncut"
"""Attribute of a layer that AutoTP has made: what it shows of the one before."""


def is_cut(parameter: nn.Parameter) -> bool:
    """Whether each tensor rank has another part of a parameter."""
    return bool(getattr(parameter, DS_TENSOR_MODEL_PARALLEL, False))


def shown_uncut(module: nn.Module) -> str:
    """Class and settings of a module, as they were before it was cut."""
    return getattr(module, _UNCUT, f"{type(module).__name__}({module.extra_repr()})")


@torch.no_grad()
def cut_model(model: nn.Module, blocks: list[Block], axis: Axis) -> None:
    """Cut a model over the ranks of an axis, all of which then have the first one's weights (collective).

    Args:
        model: of transformers, with its blocks attached; changed in place.
        blocks: its blocks.
        axis: the ranks of a tensor group.

    Raises:
        ConfigError: the class has no plan, or one that AutoTP cannot follow; the heads cannot be shared out evenly.
    """
    # Here and below, so that a DeepSpeed without them is refused by its version.
    from deepspeed.module_inject import set_autotp_mode
    from deepspeed.module_inject.auto_tp import AutoTP
    from deepspeed.module_inject.autotp_config import AutoTPConfig

    if getattr(model, "ds_autotp_parsed", False):
        raise ConfigError(
            f"tensor_parallel.autotp_size = {axis.size}: {type(model).__name__} has been cut already, by another "
            "engine; hand over a whole model."
        )
    specs = _plan_of(model, axis.size)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.numel():
            tensor.copy_(from_rank_zero(tensor.detach(), axis))
    before = dict(model.named_modules())
    shown = {name: shown_uncut(module) for name, module in before.items()}
    # Without it AutoTP takes its layers for those of inference, whose weights do not train.
    set_autotp_mode(training=True)
    made = AutoTP(
        module=model,
        all_reduce_linears=(),
        prefix="",
        state_dict=None,
        linear_layer_setting=(nn.Linear, nn.Embedding),
        orig_layer_impl=None,
        partition_config=AutoTPConfig(tp_size=axis.size, layer_specs=specs),
        vocab_parallel_lm_head=False,  # checks read all logits
        model_config=model.config,
        training_mode=True,
    )
    made.set_tensor_parallel_config(axis.size, axis.group)
    made.update_linear_policies()
    with _out_of_sight(blocks):
        made._replace_module(model)
    with _hooks_on_frozen(model):
        made.register_replicated_grad_hooks(model)
    model.ds_autotp_parsed = True  # type: ignore[assignment]  # DeepSpeed's engine must not cut it again
    for name, module in model.named_modules():
        if module is not before.get(name):
            setattr(module, _UNCUT, shown[name])
    _require_even(model, blocks, axis)
    for block in blocks:
        for bank in block.banks:
            bank.deepspeed_moe.tensor = axis
    _draw_alike(axis)


def cuttable(model: nn.Module, blocks: list[Block]) -> int:
    """Numbers in the matrices that :func:`cut_model` would cut; 0 for a model without a plan.

    Args:
        model: as there; may be without memory.
        blocks: as there.
    """
    from deepspeed.module_inject.autotp_config import AutoTPConfig, PartitionType

    try:
        config = AutoTPConfig(tp_size=1, layer_specs=_plan_of(model, 1))
    except ConfigError:
        return 0
    found, inside = 0, {id(module) for block in blocks for module in block.modules()}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, module in model.named_modules():
        spec = config.find_matching_spec(f"{name}.weight", model.config.model_type)
        if not isinstance(module, nn.Linear) or id(module) in inside or id(module.weight) in tables or spec is None:
            continue
        if spec.partition_type is not PartitionType.SKIP:
            found += module.weight.numel()
            if module.bias is not None and spec.partition_type is PartitionType.COLUMN:
                found += module.bias.numel()
    return found


def _draw_alike(axis: Axis) -> None:
    """Give all ranks the first one's random state: dropout between the cut matrices must be the same."""
    torch.set_rng_state(from_rank_zero(torch.get_rng_state(), axis))
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_rng_state(from_rank_zero(accelerator.get_rng_state(), axis))


def _plan_of(model: nn.Module, ranks: int) -> Any:
    """AutoTP's form of the plan that the model's class brings."""
    from deepspeed.module_inject.tp_plan_converter import TPPlanConverter
    from deepspeed.module_inject.tp_shard import AutoTPMeta
    from deepspeed.runtime.tensor_parallel.config import _get_hf_tp_plan

    what = f"tensor_parallel.autotp_size = {ranks}: {type(model).__name__}"
    plan = _get_hf_tp_plan(model)
    if not plan:
        raise ConfigError(
            f"{what} has no plan of tensor parallelism (base_model_tp_plan of its config), so that nothing says which "
            "matrices can be cut; take a model of transformers that has one, or remove the section."
        )
    try:
        specs = TPPlanConverter.convert(plan)
    except ValueError as error:
        raise ConfigError(f"{what} has a plan of tensor parallelism that AutoTP cannot follow: {error}") from error
    heads = AutoTPMeta.from_model_config(model.config)
    for count, kind in ((heads.num_kv_heads, "key-value heads"), (heads.num_attention_heads, "heads")):
        if count is not None and count % ranks:
            raise ConfigError(f"{what} has {count} {kind}, which {ranks} ranks cannot share evenly.")
    return specs


@contextlib.contextmanager
def _out_of_sight(blocks: list[Block]) -> Iterator[None]:
    """Within it AutoTP passes the blocks over, as it does expert layers of DeepSpeed's own."""
    for block in blocks:
        block._is_autoep_layer = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for block in blocks:
            del block._is_autoep_layer


@contextlib.contextmanager
def _hooks_on_frozen(model: nn.Module) -> Iterator[None]:
    """Within it parameters that do not train take hooks, which torch refuses: they may be let train later."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _require_even(model: nn.Module, blocks: list[Block], axis: Axis) -> None:
    cut = {name: parameter for name, parameter in model.named_parameters() if is_cut(parameter)}
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    if not cut:
        raise ConfigError(
            f"tensor_parallel.autotp_size = {axis.size} cuts nothing outside of the blocks; remove the section."
        )
    for name, parameter in cut.items():
        meta = getattr(parameter, _META, {})
        sizes = meta.get("partition_sizes")
        if id(parameter) in inside or meta.get("sub_param_sizes") or not sizes or len(set(sizes)) > 1:
            raise ConfigError(
                f"tensor_parallel.autotp_size = {axis.size}: {name} {meta.get('logical_shape')} cannot be cut into "
                "equal parts of rows or columns."
            )


def _place(parameter: nn.Parameter) -> tuple[int, int]:
    """Dimension that a parameter is cut along, and this rank's length of it."""
    dimension = getattr(parameter, _META)["partition_dim"]
    return dimension, parameter.shape[dimension]


@contextlib.contextmanager
def uncut_state_dicts(model: nn.Module, mesh: Mesh) -> Iterator[None]:
    """Context manager: state_dict() has whole matrices on the first data-parallel ranks (collective).

    They are gathered into CPU memory here. Other ranks have their own parts.
    """
    found: dict[nn.Module, dict[str, Tensor]] = {}
    if mesh.tensor.size > 1 and mesh.data.rank == 0:
        for module in model.modules():
            found[module] = {
                name: _joined(parameter, mesh.tensor)
                for name, parameter in module.named_parameters(recurse=False)
                if is_cut(parameter)
            }
    with put_into_state_dicts(found):
        yield


def _joined(parameter: nn.Parameter, axis: Axis) -> Tensor:
    dimension, _ = _place(parameter)
    rows = parameter.detach().transpose(0, dimension)
    return gather_rows(rows, axis).transpose(0, dimension).contiguous().cpu()


def cut_weights(weights: Mapping[str, Any], model: nn.Module, axis: Axis) -> dict[str, Any]:
    """A state dict of whole matrices with this rank's parts in their places.

    Args:
        weights: by name.
        model: that they go into.
        axis: the ranks of a tensor group.
    """
    found = dict(weights)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_cut(parameter) and name in found:
            dimension, length = _place(parameter)
            found[name] = found[name].narrow(dimension, axis.rank * length, length)
    return found
