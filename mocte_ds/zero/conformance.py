"""Says on which DeepSpeed versions our use of its private parts was checked, and what of it another version broke."""

import inspect
import os
import types
from collections.abc import Callable

import deepspeed
from deepspeed.runtime import engine as deepspeed_engine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

from mocte_ds.errors import MocteError
from mocte_ds.zero.optimizer import UnitZeroOptimizer

CHECKED_VERSIONS = ("0.19.8",)
OVERRIDE = "MOCTE_UNCHECKED_DEEPSPEED"

_METHODS = (
    "destroy",
    "flatten_dense_tensors_aligned",
    "get_partition_info",
    "initialize_optimizer_states",
    "_configure_moe_settings",
    "_link_all_hp_params",
    "reduce_independent_p_g_buckets_and_remove_grads",
    "reduce_ipg_grads",
    "setup_buckets",
    "_release_ipg_buffers",
    "scaled_global_norm",
)
_ATTRIBUTES = (
    "single_partition_of_fp32_groups",
    "bit16_groups_flat",
    "round_robin_bit16_groups",
    "round_robin_bit16_offsets",
    "real_dp_process_group",
    "partition_count",
    "_param_slice_mappings",
    "averaged_gradients",
    "ipg_buckets",
    "is_moe_param_group",
    "ready_for_gradients",
    "extra_large_param_to_reduce",
    "loss_scaler",
    "custom_loss_scaler",
    "external_loss_scale",
    "_hp_optimizer_states_linked",
)


_ENGINE = (
    "_configure_zero_optimizer",
    "_configure_checkpointing",
    "_copy_recovery_script",
    "_do_optimizer_sanity_check",
    "_get_zero_frozen_param_attributes",
    "_get_param_fragment_func",
    "use_node_local_storage",
    "load_universal_checkpoint",
)
_GROUPS = (
    "_create_expert_and_data_parallel",
    "_get_expert_parallel_group_dict",
    "_get_expert_parallel_rank",
    "_get_expert_parallel_group",
    "_get_expert_data_parallel_group",
)


def broken_assumptions() -> list[str]:
    """What this DeepSpeed lacks of what mocte_ds/zero relies on; empty where nothing is missing."""
    broken = [
        f"DeepSpeedZeroOptimizer.{name} is gone" for name in _METHODS if not hasattr(DeepSpeedZeroOptimizer, name)
    ]
    engine = deepspeed_engine.DeepSpeedEngine
    broken += [f"DeepSpeedEngine.{name} is gone" for name in _ENGINE if not hasattr(engine, name)]
    broken += [f"deepspeed.utils.groups.{name} is gone" for name in _GROUPS if not hasattr(groups, name)]
    if "self.checkpoint_engine" not in inspect.getsource(engine._configure_checkpointing):
        broken.append("DeepSpeedEngine._configure_checkpointing no longer makes self.checkpoint_engine")
    source = inspect.getsource(DeepSpeedZeroOptimizer)
    broken += [
        f"DeepSpeedZeroOptimizer no longer has self.{name}" for name in _ATTRIBUTES if f"self.{name}" not in source
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
    return broken


def require_conformance() -> None:
    """Refuse a DeepSpeed version that was not checked.

    Raises:
        MocteError: names the version and the assumptions that broke; the environment variable
            MOCTE_UNCHECKED_DEEPSPEED=1 goes on where none visibly broke.
    """
    if deepspeed.__version__ in CHECKED_VERSIONS:
        return
    broken = broken_assumptions()
    if os.environ.get(OVERRIDE) == "1" and not broken:
        return
    found = "; ".join(broken) if broken else f"no assumption visibly broke: {OVERRIDE}=1 goes on at your own risk"
    raise MocteError(
        f"DeepSpeed {deepspeed.__version__} was not checked with mocte_ds (checked: {', '.join(CHECKED_VERSIONS)}): "
        f"{found}. Install a checked version: pip install deepspeed=={CHECKED_VERSIONS[-1]}"
    )


def with_unit_optimizer(method: Callable) -> Callable:
    """DeepSpeedEngine._configure_zero_optimizer, making a UnitZeroOptimizer instead of DeepSpeed's.

    The method's code runs with one global name bound to our class, so that it hands over exactly the arguments that
    this DeepSpeed version hands over; DeepSpeed's own module is not changed.
    """
    names = {**method.__globals__, "DeepSpeedZeroOptimizer": UnitZeroOptimizer}
    return types.FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)
