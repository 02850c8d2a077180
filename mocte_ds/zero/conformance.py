"""The DeepSpeed versions on which our use of its private parts was checked, and what another version breaks of it."""

import inspect
import os
import types
import warnings
from collections.abc import Callable
from typing import Any

import deepspeed
from deepspeed.module_inject import auto_tp
from deepspeed.module_inject import layers as auto_tp_layers
from deepspeed.runtime import engine as deepspeed_engine
from deepspeed.runtime.zero import (
    parameter_offload,
    partition_parameters,
    partitioned_param_coordinator,
    stage3,
    stage_1_and_2,
)
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

from mocte_ds.errors import MocteError
from mocte_ds.zero.optimizer import UnitZeroOptimizer
from mocte_ds.zero.stage3 import UnitZero3Optimizer

CHECKED_VERSIONS = ("0.19.8",)
OVERRIDE = "MOCTE_UNCHECKED_DEEPSPEED"

_METHODS = (
    "destroy",
    "flatten_dense_tensors_aligned",
    "get_partition_info",
    "initialize_optimizer_states",
    "_configure_moe_settings",
    "_link_all_hp_params",
    "_lazy_init_hp_params_optimizer_state",
    "reduce_independent_p_g_buckets_and_remove_grads",
    "reduce_ipg_grads",
    "setup_buckets",
    "_release_ipg_buffers",
    "reset_cpu_buffers",
    "scaled_global_norm",
)
_ATTRIBUTES = (
    "single_partition_of_fp32_groups",
    "bit16_groups",
    "bit16_groups_flat",
    "round_robin_bit16_groups",
    "round_robin_bit16_offsets",
    "real_dp_process_group",
    "partition_count",
    "_param_slice_mappings",
    "averaged_gradients",
    "all_grad_tensors",
    "ipg_buckets",
    "is_moe_param_group",
    "ready_for_gradients",
    "extra_large_param_to_reduce",
    "loss_scaler",
    "custom_loss_scaler",
    "external_loss_scale",
    "micro_step_id",
    "cpu_offload",
    "cpu_offload_pin_memory",
    "dp_process_group",
    "dtype",
    "overflow",
)

_METHODS_3 = (
    "initialize_ds_offload",
    "independent_gradient_partition_epilogue",
    "reduce_independent_p_g_buckets_and_remove_grads",
    "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads",
    "_create_fp32_partitions",
    "_get_norm_groups",
    "_partition_all_parameters",
    "_pre_step",
    "reset_cpu_buffers",
)
_ATTRIBUTES_3 = (
    "fp16_groups",
    "fp16_partitioned_groups",
    "fp16_partitioned_groups_flat",
    "fp32_partitioned_groups_flat",
    "lp_param_buffer",
    "grad_partitions_flat_buffer",
    "__param_id_to_grad_partition",
    "averaged_gradients",
    "ipg_buckets",
    "sub_group_to_group_id",
    "subgroup_to_device",
    "master_weights_and_grads_dtype",
    "parameter_offload",
    "contiguous_gradients",
    "offload_optimizer",
    "dp_process_group",
    "_grad_acc_hooks",
    "_leaf_module_hooks",
    "loss_scaler",
    "custom_loss_scaler",
    "external_loss_scale",
    "overflow",
)
_SENTENCES_3 = (
    (stage3, "self.parameter_offload = self.initialize_ds_offload("),
    (stage3, 'families != {"autoep_expert"}'),
    (parameter_offload, "def release_backward_leftovers("),
    (parameter_offload, "param.ds_persist = True"),
    (partition_parameters, 'getattr(param, "ds_zero_partition_process_group", self.ds_process_group)'),
    (partitioned_param_coordinator, "def _invalidate_trace("),
    (deepspeed_engine, 'getattr(param, "ds_zero_partition_group_name"'),
    (deepspeed_engine, "self._validate_zero3_moe_compatibility()"),
)
_SENTENCES_CUT = (
    (auto_tp, 'getattr(child, "_is_autoep_layer", False)'),
    (auto_tp, "def register_replicated_grad_hooks("),
    (auto_tp_layers, "setattr(weight, DS_TENSOR_MODEL_PARALLEL, True)"),
    (auto_tp_layers, "'partition_dim':"),
    (deepspeed_engine, 'getattr(model, "ds_autotp_parsed", False)'),
)
_SENTENCES_SKIP = (
    (stage_1_and_2, "or self.check_grad_overflow) and is_invalid_grad_norm(scaled_global_grad_norm)"),
    (stage3, "if is_invalid_grad_norm(scaled_global_grad_norm):"),
    (deepspeed_engine, "self._step_applied = not overflow"),
    (deepspeed_engine, "self.global_samples += self.train_batch_size()"),
)


_ENGINE = (
    "_configure_zero_optimizer",
    "_configure_checkpointing",
    "_copy_recovery_script",
    "_do_optimizer_sanity_check",
    "_get_zero_frozen_param_attributes",
    "_get_param_fragment_func",
    "_get_shared_params",
    "_validate_zero3_moe_compatibility",
    "_broadcast_model",
    "_save_moe_checkpoint",
    "_get_all_ckpt_names",
    "_consolidated_16bit_state_dict",
    "_zero3_consolidated_16bit_state_dict",
    "load_module_state_dict",
    "use_node_local_storage",
    "load_universal_checkpoint",
)
_GROUPS = (
    "_create_expert_and_data_parallel",
    "_get_expert_parallel_group_dict",
    "_get_data_parallel_group",
    "_init_tp_mesh_device",
    "get_data_parallel_group",
    "get_tensor_model_parallel_group",
    "_get_expert_parallel_group",
    "_get_expert_data_parallel_group",
)


def broken_assumptions() -> list[str]:
    """What mocte_ds/zero relies on and this DeepSpeed does not have; empty if nothing is missing."""
    broken = _missing(DeepSpeedZeroOptimizer, _METHODS, _ATTRIBUTES)
    broken += _missing(DeepSpeedZeroOptimizer_Stage3, _METHODS_3, _ATTRIBUTES_3)
    engine = deepspeed_engine.DeepSpeedEngine
    broken += [f"DeepSpeedEngine.{name} is gone" for name in _ENGINE if not hasattr(engine, name)]
    broken += [f"deepspeed.utils.groups.{name} is gone" for name in _GROUPS if not hasattr(groups, name)]
    if "self.checkpoint_engine" not in inspect.getsource(engine._configure_checkpointing):
        broken.append("DeepSpeedEngine._configure_checkpointing no longer makes self.checkpoint_engine")
    if "self.sparse_tensor_module_names = set()" in inspect.getsource(engine.__init__):
        broken.append("DeepSpeedEngine saves a set, sparse_tensor_module_names, which is not a plain value")
    broken += [
        f"{module.__name__} no longer says {sentence}"
        for module, sentence in (*_SENTENCES_3, *_SENTENCES_CUT, *_SENTENCES_SKIP)
        if sentence not in inspect.getsource(module)
    ]
    order = (
        "self.flatten_dense_tensors_aligned(",
        "self.single_partition_of_fp32_groups.append(",
        "self.get_partition_info(",
    )
    places = [inspect.getsource(DeepSpeedZeroOptimizer.__init__).find(call) for call in order]
    if -1 in places or places != sorted(places):
        broken.append("the constructor no longer flattens, makes master weights and reads the partition in that order")
    configure = engine._configure_zero_optimizer
    if "DeepSpeedZeroOptimizer" not in configure.__code__.co_names or configure.__code__.co_freevars:
        broken.append("DeepSpeedEngine._configure_zero_optimizer no longer names DeepSpeedZeroOptimizer")
    if "DeepSpeedZeroOptimizer_Stage3" not in configure.__code__.co_names or "DeepSpeedZeroOptimizer_Stage3" in vars(
        deepspeed_engine
    ):
        broken.append("DeepSpeedEngine._configure_zero_optimizer no longer imports DeepSpeedZeroOptimizer_Stage3")
    return broken


def _missing(cls: type, methods: tuple[str, ...], attributes: tuple[str, ...]) -> list[str]:
    source = inspect.getsource(cls)
    gone = [f"{cls.__name__}.{name} is gone" for name in methods if not hasattr(cls, name)]
    return gone + [f"{cls.__name__} no longer has self.{name}" for name in attributes if f"self.{name}" not in source]


def require_conformance() -> None:
    """Refuse a DeepSpeed version that was not checked.

    Raises:
        MocteError: names the version and the assumptions that broke; the environment variable
            MOCTE_UNCHECKED_DEEPSPEED=1 makes it a warning.
    """
    if deepspeed.__version__ in CHECKED_VERSIONS:
        return
    broken = broken_assumptions()
    found = "; ".join(broken) or "no assumption visibly broke"
    if os.environ.get(OVERRIDE) == "1":
        warnings.warn(f"DeepSpeed {deepspeed.__version__} was not checked with mocte_ds: {found}", stacklevel=2)
        return
    raise MocteError(
        f"DeepSpeed {deepspeed.__version__} was not checked with mocte_ds (checked: {', '.join(CHECKED_VERSIONS)}): "
        f"{found}. Install a checked version: pip install deepspeed=={CHECKED_VERSIONS[-1]}; {OVERRIDE}=1 goes on at "
        "your own risk."
    )


def with_unit_optimizer(method: Callable) -> Callable:
    """DeepSpeedEngine._configure_zero_optimizer, making one of our optimizers instead of DeepSpeed's.

    The method's code runs with one global name bound to our class, so that our class gets exactly the arguments of this
    DeepSpeed version. The class of stage 3 it imports itself: that name is ours while it runs.
    """
    names = {**method.__globals__, "DeepSpeedZeroOptimizer": UnitZeroOptimizer}
    configure = types.FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)

    def configured(*arguments: Any) -> Any:
        stage3.DeepSpeedZeroOptimizer_Stage3 = UnitZero3Optimizer
        try:
            return configure(*arguments)
        finally:
            stage3.DeepSpeedZeroOptimizer_Stage3 = DeepSpeedZeroOptimizer_Stage3

    return configured
