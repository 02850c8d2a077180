"""The config of an engine: what initialize() reads, and what it refuses before any work starts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from mocte_ds.deepspeed_settings import checked_settings, tensor_ranks
from mocte_ds.errors import ConfigError
from mocte_ds.json_files import read_json
from mocte_ds.zero import require_stage3_settings


def read_config(config: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """A private copy of the config, from a dict or a JSON file.

    Raises:
        ConfigError: it cannot be read, or has no "mocte" block.
    """
    if config is None:
        raise ConfigError("mocte_ds.initialize needs config=: a DeepSpeed config (dict or path) with a 'mocte' block.")
    values: Any = read_json(config) if isinstance(config, str | Path) else config
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"the DeepSpeed config must be a dict or the path of a JSON file, not {type(values).__name__}."
        )
    if values.get("mocte") is None:
        raise ConfigError(
            'the DeepSpeed config has no "mocte" block, e.g. "mocte": {"modules": "model.layers.*.mlp"}; '
            "a run without blocks is deepspeed.initialize."
        )
    return checked_settings(values)


def require_supported(settings: dict[str, Any], model: nn.Module | None, optimizer: Any, mpu: Any) -> None:
    """Refuse what does not go with blocks.

    Args:
        settings: of :func:`read_config`.
        model: as of initialize().
        optimizer: as of initialize().
        mpu: as of initialize().

    Raises:
        ConfigError: names it, with what to do.
    """
    if model is None:
        raise ConfigError("mocte_ds.initialize needs model=.")
    if isinstance(model, deepspeed.PipelineModule):
        raise ConfigError("pipeline modules are not supported; hand over the plain model.")
    if hasattr(model, "_orig_mod"):
        raise ConfigError(
            "torch.compile(model) gives the weights other names, which checkpoints and exports would have; hand over "
            "the model itself, and compile in place: model.compile() before, or engine.compile() after initialize."
        )
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise ConfigError(
            f"zero_optimization.stage = {stage}: use stage 1, 2 or 3 (freezing acts on ZeRO's partition)."
        )
    if stage == 3:
        require_stage3_settings(settings, model)
    zero = settings["zero_optimization"]
    for name in ("contiguous_gradients", "reduce_scatter"):
        if not zero.get(name, True):
            # DeepSpeed would find out when the first experts emerge.
            raise ConfigError(f"zero_optimization.{name} = false: DeepSpeed's expert layers need true; remove it.")
    if isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            "an optimizer object cannot follow experts that do not exist yet; name the optimizer in the config, or "
            "hand over a callable: optimizer=lambda groups: torch.optim.AdamW(groups, lr=...)."
        )
    kind = settings.get("optimizer", {}).get("type", "").lower()
    if optimizer is None and kind in ("muon", "adagrad"):
        raise ConfigError(
            f"optimizer.type '{settings['optimizer']['type']}' builds its own parameter groups or state, which cannot "
            "follow experts that emerge and freeze; use AdamW or Adam."
        )
    if optimizer is None and "optimizer" not in settings:
        raise ConfigError('the DeepSpeed config has no "optimizer" and no optimizer callable was handed over.')
    _check_accumulation((settings.get("data_types") or {}).get("grad_accum_dtype"), settings, stage)
    if hasattr(mpu, "get_sequence_parallel_world_size") and mpu.get_sequence_parallel_world_size() > 1:
        raise ConfigError(
            "mpu spreads sequences over ranks (DeepSpeed-Ulysses), which is not supported: routers, samples and token "
            "counts read whole sequences (docs/tensor_parallel.md); leave it out."
        )
    if hasattr(mpu, "get_tensor_model_parallel_world_size") and mpu.get_tensor_model_parallel_world_size() > 1:
        raise ConfigError(
            "mpu has tensor-parallel ranks, whose layers mocte_ds does not know; hand over the whole model and set "
            "tensor_parallel.autotp_size, which cuts it."
        )
    if tensor_ranks(settings) > 1:
        _check_tensor_parallel(settings, stage, mpu)


def _check_tensor_parallel(settings: dict[str, Any], stage: int, mpu: Any) -> None:
    """What does not go with matrices that are cut."""
    told = f"tensor_parallel.autotp_size = {tensor_ranks(settings)}"
    if stage == 3:
        raise ConfigError(
            f"{told} is not supported under ZeRO stage 3, which partitions whole matrices; use stage 1 or 2."
        )
    if (settings["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none":
        raise ConfigError(
            f"{told} is not supported with zero_optimization.offload_optimizer: gradients are compared between tensor "
            "ranks on the device; remove one of them."
        )
    if mpu is not None:
        raise ConfigError(f"{told} makes the parallel groups itself; leave mpu out.")


def _check_accumulation(dtype: Any, settings: dict[str, Any], stage: int) -> None:
    """Gradients are added up in the model's precision, or in fp32 where DeepSpeed's optimizer of the stage does so."""
    if dtype in (None, "null"):
        return
    if dtype != "fp32":
        raise ConfigError(
            f"data_types.grad_accum_dtype = {dtype!r}: only 'fp32' is supported; without it gradients are added up in "
            "the model's precision."
        )
    if stage == 1 and (settings.get("bf16") or {}).get("enabled"):
        raise ConfigError(
            "data_types.grad_accum_dtype = 'fp32' with bf16 is not supported at ZeRO stage 1, where DeepSpeed uses an "
            "optimizer of another kind (BF16_Optimizer), which cannot freeze units; use zero_optimization.stage 2 or 3."
        )
