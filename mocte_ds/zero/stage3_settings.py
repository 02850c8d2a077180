"""Which settings of DeepSpeed do not go with blocks under ZeRO stage 3, said before any work starts."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mocte_ds.errors import ConfigError

_ZERO = {
    "offload_param": "weights stay on the GPUs",
    "cpu_offload_param": "weights stay on the GPUs",
    "zenflow": "it keeps optimizer state of its own, which cannot follow experts",
    "zero_hpz_partition_size": "a second copy of the weights would not follow experts",
    "mics_shard_size": "it shares weights out over other ranks than experts are on",
    "zero_quantized_weights": "experts and dense weights are gathered exactly",
    "zero_quantized_nontrainable_weights": "frozen experts must keep every bit",
    "zero_quantized_gradients": "its exchange takes no expert groups",
    "stage3_module_granularity_threshold": "experts are gathered one by one",
    "module_granularity_threshold": "experts are gathered one by one",
    "elastic_checkpoint": "DeepSpeed has dropped it",
}
_OFF: tuple[Any, ...] = (None, False, 0, {})
_HARMLESS = {"zero_hpz_partition_size": (1,), "mics_shard_size": (-1,)}


def require_stage3_settings(settings: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse what does not work.

    Args:
        settings: the DeepSpeed config with `zero_optimization.stage` 3.
        model: before its blocks are attached.

    Raises:
        ConfigError: names the key, its value and what to do.
    """
    zero = settings["zero_optimization"]
    for name, reason in _ZERO.items():
        value = zero.get(name)
        offloads_nothing = isinstance(value, Mapping) and value.get("device") in ("none", None)
        if value in _OFF or value in _HARMLESS.get(name, ()) or (name == "offload_param" and offloads_nothing):
            continue
        _refuse(f"zero_optimization.{name}", value, reason)
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device") == "nvme":
        _refuse("zero_optimization.offload_optimizer.device", "nvme", "units cannot leave its files; use 'cpu'")
    if offload.get("ratio", 1.0) != 1.0:
        _refuse("zero_optimization.offload_optimizer.ratio", offload["ratio"], "a second optimizer cannot follow units")
    if offload.get("super_offload"):
        _refuse("zero_optimization.offload_optimizer.super_offload", True, "it is another optimizer than ours")
    if (settings.get("compile") or {}).get("deepcompile"):
        _refuse("compile.deepcompile", True, "a compiled graph cannot follow experts that emerge and freeze")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ConfigError(
            "the model was made inside deepspeed.zero.Init, and its weights are partitioned already; experts are made "
            "of whole FFNs. Make the model outside of it, in CPU memory."
        )


def _refuse(key: str, value: Any, reason: str) -> None:
    raise ConfigError(f"{key} = {value!r} is not supported with blocks under stage 3 ({reason}); remove it.")
