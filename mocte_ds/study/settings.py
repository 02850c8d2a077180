"""Whether a folder holds a run of the settings that a study asks for: results of others must not enter its table."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mocte_ds.config import MocteConfig
from mocte_ds.data import Manifest
from mocte_ds.errors import ConfigError
from mocte_ds.json_files import read_json
from mocte_ds.report.settings import flat
from mocte_ds.study.plan import PlannedRun, Study
from mocte_ds.training.model import model_facts
from mocte_ds.training.run_config import FREE_TRAINING_KEYS

MOCTE = "deepspeed.mocte."
# What a run may change without learning something else.
_FREE = (
    "model.activation_checkpointing",
    "deepspeed.train_micro_batch_size_per_gpu",
    "deepspeed.gradient_accumulation_steps",
    "deepspeed.tensorboard.",
    *(f"training.{name}" for name in FREE_TRAINING_KEYS),
)


def wanted_settings(study: Study, planned: PlannedRun) -> dict[str, Any]:
    """All settings of a run, flat, under the names that run.json has for them.

    Raises:
        ConfigError: settings that are refused; names the arm.
        DataError: the data is not there.
    """
    run = study.config(planned)
    manifest = Manifest.read(run.data.prepared)
    try:
        settings = run.resolve(study.processes, manifest.eod_id, manifest.vocab_size)
    except ConfigError as error:
        raise ConfigError(f"arm {planned.arm.name}, seed {planned.seed}: {error}") from error
    if "mocte" in settings:
        settings["mocte"] = MocteConfig.from_dict(settings["mocte"]).to_dict()
    facts = {
        "world_size": study.processes,
        "model": model_facts(run.model),
        "data": {"weights": run.data.weights, "manifest_sha256": manifest.sha256},
        "training": {**asdict(run.training), "context": run.context, "warmup_steps": run.warmup_steps},
        "evaluation": asdict(run.evaluation),
        "deepspeed": settings,
    }
    return flat(json.loads(json.dumps(facts)))


def differences(folder: Path, wanted: dict[str, Any]) -> list[str]:
    """Where the run in a folder has other settings than wanted, a few words each; empty where there is no run.

    Keys that only one side has do not count: another version of the package wrote the folder. A run with blocks and one
    without always differ.

    Args:
        folder: the run's.
        wanted: see :func:`wanted_settings`.
    """
    try:
        found = flat(read_json(folder / "run.json"))
    except ConfigError:
        return []
    words = {}
    for key in {**wanted, **found}:
        if key in wanted and key in found:
            same = wanted[key] == found[key]
        else:  # a value where the other side has a section
            key = next((part for part in _sections(key) if part in wanted or part in found), "")
            same = not key
        if not same and not key.startswith(_FREE):
            there, asked = (repr(side[key]) if key in side else "a section" for side in (found, wanted))
            words[key] = f"{key} is {there}, not {asked}"
    blocks = [any(key.startswith(MOCTE) for key in side) for side in (found, wanted)]
    if blocks[0] != blocks[1]:
        words[MOCTE] = f"it is a run {'with' if blocks[0] else 'without'} blocks"
    return list(words.values())


def _sections(key: str) -> list[str]:
    """Names of the sections that a key lies in."""
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]
