"""Run files: everything about a run in one YAML file, checked before any work starts."""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from mocte_ds.config import MocteConfig, parse_section
from mocte_ds.errors import ConfigError
from mocte_ds.models import DecoderConfig, preset


@dataclass(frozen=True)
class DataSection:
    """What the model reads."""

    prepared: str = ""
    """Folder made by tools/prepare_data.py; it holds the tokenizer too. Required."""
    weights: dict[str, float] | None = None
    """Share of each domain, any scale; null: by tokens."""


@dataclass(frozen=True)
class TrainingSection:
    """How long and how fast."""

    steps: int = 0
    """Optimizer steps. Required."""
    batch_tokens: int = 0
    """Tokens of a global batch. Required; a multiple of ranks x micro_batch x context."""
    context: int = 0
    """Tokens of a sequence; 0: the model's max_positions."""
    micro_batch: int = 8
    """Sequences of a micro-batch on one rank."""
    learning_rate: float = 3e-4
    """Largest learning rate."""
    warmup_steps: int = 0
    """Steps of linear warm-up; 0: 2 % of the steps."""
    min_learning_rate_ratio: float = 0.1
    """The cosine ends at this share of the learning rate."""
    weight_decay: float = 0.1
    """AdamW's decay; never on norms and biases."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's moments."""
    gradient_clipping: float = 1.0
    """Largest gradient norm."""
    seed: int = 0
    """Seed of weights, data order and sampling."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: a tenth of the steps."""
    keep_checkpoints: int = 2
    """Checkpoints that stay on the disk."""


@dataclass(frozen=True)
class EvaluationSection:
    """What is measured on the way and at the end."""

    every: int = 0
    """Steps between validations; 0: a twentieth of the steps."""
    sequences_per_domain: int = 8
    """Validation sequences of each domain."""
    tasks: list[str] = field(default_factory=list)
    """lm-evaluation-harness tasks for the exported model."""
    limit: int | None = None
    """Items of each task; null: all."""


@dataclass(frozen=True)
class RunConfig:
    """A run file with its defaults filled in."""

    model: DecoderConfig
    data: DataSection
    training: TrainingSection
    evaluation: EvaluationSection
    deepspeed: dict[str, Any]

    def resolve(self, world_size: int, eod_id: int, vocab_size: int) -> dict[str, Any]:
        """The DeepSpeed config of this run: the file's, completed from the other sections.

        Args:
            world_size: data-parallel ranks.
            eod_id: token that ends a document.
            vocab_size: the tokenizer's.

        Raises:
            ConfigError: sizes that do not divide, or values that the sections contradict.
        """
        t, settings = self.training, copy.deepcopy(self.deepspeed)
        if vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {vocab_size} pieces, model.vocab_size is {self.model.vocab_size}; raise the model's."
            )
        unit = world_size * t.micro_batch * self.context
        if t.batch_tokens % unit:
            raise ConfigError(
                f"training.batch_tokens = {t.batch_tokens} is no multiple of {unit} = {world_size} ranks x "
                f"micro_batch {t.micro_batch} x context {self.context}."
            )
        complete = {
            "train_batch_size": t.batch_tokens // self.context,
            "train_micro_batch_size_per_gpu": t.micro_batch,
            "gradient_accumulation_steps": t.batch_tokens // unit,
            "gradient_clipping": t.gradient_clipping,
            "seed": t.seed,
        }
        for key, value in complete.items():
            if settings.setdefault(key, value) != value:
                raise ConfigError(f"deepspeed.{key} = {settings[key]} contradicts the run file, which asks for {value}.")
        optimizer = settings.setdefault("optimizer", {"type": "AdamW", "params": {}})
        for key, value in (("lr", t.learning_rate), ("betas", list(t.betas)), ("weight_decay", t.weight_decay)):
            optimizer.setdefault("params", {}).setdefault(key, value)
        settings.setdefault(
            "scheduler",
            {
                "type": "WarmupCosineLR",
                "params": {
                    "total_num_steps": t.steps,
                    "warmup_num_steps": self.warmup_steps,
                    "warmup_min_ratio": 0.0,
                    "cos_min_ratio": t.min_learning_rate_ratio,
                    "warmup_type": "linear",
                },
            },
        )
        if "mocte" in settings:
            block = settings["mocte"]
            block.setdefault("total_steps", t.steps)
            block.setdefault("eod_id", eod_id)
            block.setdefault("seed", t.seed)
            MocteConfig.from_dict(block, world_size)
        return settings

    @property
    def context(self) -> int:
        """Tokens of a sequence."""
        return self.training.context or self.model.max_positions

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return self.training.warmup_steps or max(1, self.training.steps // 50)

    @property
    def checkpoint_every(self) -> int:
        """Steps between checkpoints."""
        return self.training.checkpoint_every or max(1, self.training.steps // 10)

    @property
    def validate_every(self) -> int:
        """Steps between validations."""
        return self.evaluation.every or max(1, self.training.steps // 20)

    def identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed, flat, for a comparison key by key."""
        keys = ("steps", "batch_tokens", "context", "learning_rate", "warmup_steps", "seed", "weight_decay")
        training = {f"training.{key}": getattr(self.training, key) for key in keys}
        return {**{f"model.{key}": value for key, value in asdict(self.model).items()}, **training}


def read_run(path: str | Path, changes: Sequence[str] = ()) -> RunConfig:
    """Read a run file.

    Args:
        path: YAML file with the sections model, data, training, evaluation and deepspeed.
        changes: `section.key=value` each, value in YAML; they win over the file.

    Raises:
        ConfigError: unreadable file, unknown section or key, wrong value, missing required value.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the run file {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no run file: it must have the sections model, data, training, deepspeed.")
    _load_deepspeed(values, path)
    for change in changes:
        _set(values, change)
    known = {f.name for f in fields(RunConfig)}
    for name in values:
        if name not in known:
            raise ConfigError(f"{path}: unknown section '{name}'. Allowed: {', '.join(sorted(known))}.")
    run = RunConfig(
        model=_model(values.get("model") or {}),
        data=parse_section(DataSection, values.get("data") or {}, "data"),
        training=parse_section(TrainingSection, values.get("training") or {}, "training"),
        evaluation=parse_section(EvaluationSection, values.get("evaluation") or {}, "evaluation"),
        deepspeed=values.get("deepspeed") or {},
    )
    for name, value in (("data.prepared", run.data.prepared), ("training.steps", run.training.steps)):
        if not value:
            raise ConfigError(f"{path}: {name} is missing.")
    if run.training.batch_tokens < 1 or run.training.micro_batch < 1:
        raise ConfigError(f"{path}: training.batch_tokens and training.micro_batch must be at least 1.")
    if run.context > run.model.max_positions:
        raise ConfigError(
            f"training.context = {run.context} is longer than model.max_positions = {run.model.max_positions}."
        )
    if "mocte" in run.deepspeed:
        MocteConfig.from_dict(run.deepspeed["mocte"])
    return run


def _model(section: dict[str, Any]) -> DecoderConfig:
    section = dict(section)
    if "preset" in section:
        base = asdict(preset(section.pop("preset")))
        return parse_section(DecoderConfig, {**base, **section}, "model")
    missing = [f.name for f in fields(DecoderConfig) if f.default is f.default_factory and f.name not in section]
    if missing:
        raise ConfigError(f"model: either a preset or all sizes are needed; missing: {', '.join(missing)}.")
    return parse_section(DecoderConfig, section, "model")


def _load_deepspeed(values: dict[str, Any], path: Path) -> None:
    """`deepspeed:` is a section, or the path of a JSON file relative to the run file or to the working folder."""
    where = values.get("deepspeed")
    if not isinstance(where, str):
        return
    for candidate in (path.parent / where, Path(where)):
        if candidate.is_file():
            try:
                values["deepspeed"] = json.loads(candidate.read_text(encoding="utf-8"))
                return
            except ValueError as error:
                raise ConfigError(f"{candidate} is no JSON: {error}.") from error
    raise ConfigError(f"{path}: deepspeed = {where!r} is no file (looked beside the run file and in the working folder).")


def _set(values: dict[str, Any], change: str) -> None:
    key, separator, text = change.partition("=")
    parts = key.split(".")
    if not separator or len(parts) < 2:
        raise ConfigError(f"--set {change!r}: write section.key=value, e.g. training.steps=100.")
    section = values
    for part in parts[:-1]:
        if not isinstance(section.get(part), dict):
            section[part] = {}
        section = section[part]
    section[parts[-1]] = yaml.safe_load(text)
