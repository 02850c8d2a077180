"""run.json: what is so for any run, and what the engine knows of one of a user's own script."""

import sys
from collections.abc import Mapping
from typing import Any

from deepspeed.accelerator import get_accelerator
from torch import nn

from mocte_ds.base_model import base_facts
from mocte_ds.logs import LOGGED_BY
from mocte_ds.secret_keys import command_shown, without_secrets
from mocte_ds.versions import versions


def count_parameters(model: nn.Module) -> int:
    """Numbers that a model has, those that ZeRO stage 3 has partitioned among them."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def start_facts(ranks: int) -> dict[str, Any]:
    """What is so for any run: its command, ranks, device and versions.

    Args:
        ranks: of the run.
    """
    device = get_accelerator().device_name()
    return {"command": command_shown(sys.argv), "world_size": ranks, "device": device, "versions": versions()}


def run_facts(engine: Any, settings: Mapping[str, Any], parameters: int) -> dict[str, Any]:
    """What stands in run.json.

    Args:
        engine: of mocte_ds.initialize.
        settings: the DeepSpeed config without its "mocte" block.
        parameters: of the dense model.
    """
    mocte, base = engine.mocte, base_facts(engine.module)
    values = {f"hf.{key}": value for key, value in base.get("config", {}).items() if _is_plain(value)}
    return {
        "logged_by": LOGGED_BY,
        **start_facts(engine.mesh.world.size),
        "model": {"class": type(engine.module).__name__, **values},
        "parameters": parameters,
        "training": {"steps": mocte.total_steps, "micro_batch": engine.train_micro_batch_size_per_gpu()},
        "deepspeed": {**_shown(without_secrets(settings)), "mocte": mocte.config.to_dict()},
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | None)


def _shown(value: Any) -> Any:
    """A config as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _shown(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(inner) for inner in value]
    return value if _is_plain(value) else str(value)
