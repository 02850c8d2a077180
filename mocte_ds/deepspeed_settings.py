"""What is checked in a DeepSpeed config before DeepSpeed sees it, and its refusals as one message."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import torch
from pydantic import BaseModel, ValidationError

from mocte_ds.errors import ConfigError
from mocte_ds.shown import name_shown, nearest, shown
from mocte_ds.value_bounds import require_plain

_SECTIONS = (
    "activation_checkpointing bf16 checkpoint comms_logger csv_monitor data_types flops_profiler fp16 "
    "mocte optimizer scheduler tensor_parallel tensorboard torch_autocast wandb zero_optimization"
).split()
# DeepSpeed passes over a key that it does not know without a word.
_KNOWN = [
    *_SECTIONS,
    *(
        "aio comet communication_data_type dataloader_drop_last disable_allgather disable_python_gc dump_state "
        "gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor log_level "
        "memory_breakdown prescale_gradients seed steps_per_print timers train_batch_size "
        "train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown "
        "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer"
    ).split(),
]
_REMOVED = "DeepSpeed has removed it"
_UNTRIED = "it has not been tried with blocks"
_WHOLE = "routers, samples and token counts read whole sequences (docs/tensor_parallel.md)"
_UNSUPPORTED = {
    "autotp_size": "it belongs into the section tensor_parallel",
    "sequence_parallel_size": f"{_WHOLE}; remove it",
    "seq_parallel_communication_data_type": f"{_WHOLE}; remove it",
    "data_parallel_size": "it follows from the number of processes; remove it",
    "pipeline": "every rank holds all layers; remove it",
    "expert_parallel": "experts are the business of the block mocte (mocte.ep_size); remove it",
    "managed_gradient_accumulation": "tokens are counted by DeepSpeed's own accumulation; remove it",
    "hybrid_engine": f"{_UNTRIED}; remove it",
    "compile": f"{_UNTRIED}; remove it",
    "data_efficiency": "it changes the tokens that layers see, and samples and loads would be wrong; remove it",
    "weight_quantization": f"{_UNTRIED}; remove it",
    "compression_training": f"{_UNTRIED}; remove it",
    "autotuning": f"{_UNTRIED}; remove it",
    "datastates_ckpt": "checkpoints are written by mocte.checkpoint; remove it",
    "nebula": f"{_REMOVED}; checkpoints are written by mocte.checkpoint",
    "elasticity": f"{_REMOVED}; set train_batch_size and its parts",
    "amp": f"{_REMOVED}; use bf16, fp16 or torch_autocast",
    "sparse_gradients": _REMOVED,
    "quantize_training": _REMOVED,
    "eigenvalue": _REMOVED,
    "sparse_attention": _REMOVED,
    "graph_harvesting": _REMOVED,
    "curriculum_learning": _REMOVED,
    "progressive_layer_drop": _REMOVED,
}
_SWITCHES = ("bf16", "fp16", "tensorboard", "torch_autocast", "wandb", "csv_monitor", "flops_profiler")
_KEYS = {
    "activation_checkpointing": "partition_activations contiguous_memory_optimization cpu_checkpointing "
    "number_checkpoints synchronize_checkpoint_boundary profile",
    "aio": "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds",
    "checkpoint": "tag_validation checkpoint_serialization writer load_universal use_node_local_storage parallel_write",
    "data_types": "grad_accum_dtype",
    "flops_profiler": "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
    "optimizer": "type params legacy_fusion",
    "scheduler": "type params",
    "timers": "throughput",
    "torch_autocast": "enabled dtype lower_precision_safe_modules",
}
"""Keys of the sections in which DeepSpeed passes over what it does not know; it refuses unknown keys of the others."""
_LINES = 12


def checked_settings(settings: Mapping[Any, Any], where: str = "the DeepSpeed config") -> dict[str, Any]:
    """A private copy of a DeepSpeed config whose keys are known and whose sections are sections; null is left out.

    Args:
        settings: the config, as a user wrote it.
        where: its place, for messages.

    Raises:
        ConfigError: a key, of the config or of a section, that nobody knows (with the nearest known one) or that is
            not supported (says why), a section that is none, a key that is not a text, a switch that is not a
            boolean, a number that is NaN, infinite or too large, or nesting deeper than any config.
    """
    require_plain(settings, where)
    for key in settings:
        if not isinstance(key, str):
            raise ConfigError(f"{where}: the key {name_shown(key)} must be a text.")
    kept = {key: value for key, value in settings.items() if not (value is None and key in (*_SECTIONS, *_UNSUPPORTED))}
    for key, value in list(kept.items()):
        if key in _UNSUPPORTED and _is_unused(value):
            del kept[key]
        elif key in _UNSUPPORTED:
            raise ConfigError(f"{where}: {key} = {shown(value)} is not supported: {_UNSUPPORTED[key]}.")
        elif key not in _KNOWN:
            name = f"{where}.{name_shown(key)}" if where.isidentifier() else f"{name_shown(key)} of {where}"
            raise ConfigError(f"unknown key {name} (value {shown(value)}).{nearest(key, _KNOWN)}")
    for name in _SECTIONS:
        section = kept.get(name, {})
        if not isinstance(section, Mapping):
            raise ConfigError(f"{where}: {name} = {shown(section)} must be a section with keys.")
        enabled = section.get("enabled", False)
        if name in _SWITCHES and not isinstance(enabled, bool):
            raise ConfigError(f"{where}: {name}.enabled = {shown(enabled)} must be true or false.")
    for name, keys in _KEYS.items():
        section = kept.get(name)
        for key in section if isinstance(section, Mapping) else ():
            if key not in keys.split():
                place = f"{name}.{name_shown(key)}"
                raise ConfigError(f"{where}: unknown key {place}.{nearest(key, keys.split())}")
    for name in ("optimizer", "scheduler"):
        section = kept.get(name, {})
        if not isinstance(section.get("type", ""), str):
            raise ConfigError(f"{where}: {name}.type = {shown(section['type'])} must be a name.")
        if not isinstance(section.get("params", {}), Mapping):
            raise ConfigError(f"{where}: {name}.params = {shown(section['params'])} must be a section with keys.")
    params = kept.get("optimizer", {}).get("params", {})
    for name in ("lr", "eps", "weight_decay"):
        value = params.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ConfigError(f"{where}: optimizer.params.{name} = {shown(value)} must be a number of 0 or more.")
    _check_tensor_parallel(kept, where)
    stage = kept.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{where}: zero_optimization.stage = {shown(stage)} must be 0, 1, 2 or 3.")
    return copy.deepcopy(kept)


def _check_tensor_parallel(kept: dict[str, Any], where: str) -> None:
    """Leave the section out where it asks for nothing; refuse in it what is not supported."""
    section = kept.pop("tensor_parallel", {})
    for name, value in section.items():
        if name != "autotp_size" and not _is_unused(value):
            raise ConfigError(
                f"{where}: tensor_parallel.{name_shown(name)} = {shown(value)} is not supported: only autotp_size is, "
                "with the plan that the model's class brings; remove it."
            )
    size = section.get("autotp_size") or 0
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ConfigError(f"{where}: tensor_parallel.autotp_size = {shown(size)} must be a number of ranks.")
    if size > 1:
        kept["tensor_parallel"] = {"autotp_size": size}


def tensor_ranks(settings: Mapping[str, Any]) -> int:
    """Ranks that a config of :func:`checked_settings` cuts every matrix of attention over; 1: none is cut."""
    return settings.get("tensor_parallel", {}).get("autotp_size", 1)


def _is_unused(value: Any) -> bool:
    """Whether the value of a key that is not supported says that it is not used."""
    if isinstance(value, Mapping):
        return value.get("enabled") is False or all(_is_unused(inner) for inner in value.values())
    return value is None or value is False or (value is not True and value in (0, 1))


def require_scheduler(settings: Mapping[str, Any], where: str = "the DeepSpeed config") -> None:
    """Refuse a scheduler that DeepSpeed could not make, before it makes anything.

    Args:
        settings: from :func:`checked_settings`.
        where: its place, for messages.

    Raises:
        ConfigError: an unknown type, a parameter that the type does not have, or one that it needs and that is missing.
    """
    import torch
    from deepspeed.runtime import lr_schedules

    section = settings.get("scheduler") or {}
    if "type" not in section:
        return
    kind, own = section["type"], list(lr_schedules.VALID_LR_SCHEDULES)
    others = [name for name, item in vars(torch.optim.lr_scheduler).items() if inspect.isclass(item)]
    if kind not in own and kind not in others:
        known = [*own, *(name for name in others if name.endswith("LR"))]
        raise ConfigError(f"{where}: scheduler.type = {shown(kind)} is not one of {own}.{nearest(kind, known)}")
    maker = getattr(lr_schedules if kind in own else torch.optim.lr_scheduler, kind)
    parameters = {name: p for name, p in inspect.signature(maker).parameters.items() if name != "optimizer"}
    params = section.get("params", {})
    for name in params:
        if name not in parameters:
            near = nearest(name, parameters)
            raise ConfigError(
                f"{where}: scheduler.params.{name_shown(name)} is not a parameter of {kind}.{near} It has "
                f"{', '.join(parameters)}."
            )
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in params]
    if missing:
        raise ConfigError(f"{where}: scheduler.params.{missing[0]} is missing; {kind} needs it.")


def scheduled_steps(settings: Mapping[str, Any]) -> int | None:
    """`total_num_steps` of the scheduler, None where it has none.

    Raises:
        ConfigError: it is not a number of steps.
    """
    steps = settings.get("scheduler", {}).get("params", {}).get("total_num_steps")
    if steps is None:
        return None
    if isinstance(steps, bool) or not isinstance(steps, int | float) or steps < 1 or steps != int(steps):
        raise ConfigError(f"scheduler.params.total_num_steps = {shown(steps)} must be a whole number of 1 or more.")
    return int(steps)


def parsed_by_deepspeed(settings: dict[str, Any], mpu: Any = None) -> Any:
    """DeepSpeed's own object of a config.

    Raises:
        ConfigError: DeepSpeed refuses it; with its reason.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        return DeepSpeedConfig(settings, mpu)
    except Exception as error:  # asserts, pydantic's errors, and whatever a wrong type runs into
        if isinstance(error, ValidationError):
            _require_known_fields(error)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        told = "; ".join(line[:200] for line in lines[:_LINES])
        raise ConfigError(f"DeepSpeed refuses its config: {told}") from error


def _require_known_fields(error: ValidationError) -> None:
    """Name the nearest field where an error is about an unknown one.

    Raises:
        ConfigError: it is.
    """
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    unknown = next((detail for detail in error.errors() if detail["type"] == "extra_forbidden"), None)
    if unknown is None:
        return
    *path, key = map(str, unknown["loc"])
    section = next((model for model in _subclasses(DeepSpeedConfigModel) if model.__name__ == error.title), None)
    for name in path:
        field = section.model_fields.get(name) if section else None
        inner = get_args(field.annotation) or (field.annotation,) if field else ()
        section = next((kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    fields = section.model_fields if section else {}
    names = [*fields, *(field.alias for field in fields.values() if field.alias)]
    place = ".".join([*path, name_shown(key)])
    raise ConfigError(
        f"DeepSpeed refuses its config: unknown key {place} ({error.title}).{nearest(key, names)}"
    ) from error


def _subclasses(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for below in model.__subclasses__():
        yield below
        yield from _subclasses(below)


def type_of_weights(settings: Mapping[str, Any]) -> torch.dtype:
    """Type that DeepSpeed gives a model's parameters by its config."""
    for key, dtype in (("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)):
        if (settings.get(key) or {}).get("enabled"):
            return dtype
    return torch.float32
