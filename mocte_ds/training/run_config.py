"""Run files: everything about a run in one YAML file, checked before any work starts."""

import copy
from collections.abc import Sequence
from dataclasses import MISSING, asdict, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mocte_ds.checkpoints.base import base_in_checkpoint
from mocte_ds.config import MocteConfig
from mocte_ds.data.verify import Amount
from mocte_ds.deepspeed_settings import checked_settings, tensor_ranks
from mocte_ds.errors import ConfigError
from mocte_ds.sections import Count, CountOrZero, NotNegative, Positive, Seed, Share, parse_section, section
from mocte_ds.shipped import shipped_file
from mocte_ds.shown import name_shown, nearest, shown
from mocte_ds.skips import require_skippable
from mocte_ds.training.model import NO_LIMIT, CheckpointModel, ModelConfig, TransformersModel, model_facts
from mocte_ds.training.model_config import config_from, require_known
from mocte_ds.training.presets import preset
from mocte_ds.training.run_file import read_values
from mocte_ds.training.schedule import warmup_cosine
from mocte_ds.training.watch_section import WatchSection

# Changing these does not change what is learned.
FREE_TRAINING_KEYS = ("compile", "micro_batch", "checkpoint_every", "keep_checkpoints")
OF_THE_RUN = ("activation_checkpointing", "bigram")
"""Keys of `model` that are not of the config of transformers."""


@section("data")
class DataSection:
    """What the model reads."""

    prepared: str
    """Folder made by tools/prepare_data.py; it holds the tokenizer too."""
    weights: dict[str, NotNegative] | None = None
    """Domain to its share of the training tokens, on any scale. Null: in proportion to the domains' tokens."""
    document_mask: bool = False
    """Whether a token of a packed sequence sees only its own document, with positions from the document's start. False:
    attention crosses the borders of documents (docs/data.md)."""
    verify: Amount = "auto"
    """How much of the data is checked against its hashes when a run starts. `all`: everything. `sample`: a sample of
    each file. `auto`: files of up to 256 MiB, and a sample of larger ones. Token ids are always checked."""

    def __post_init__(self) -> None:
        if not self.prepared:
            raise ConfigError("prepared must name the folder that tools/prepare_data.py made.")
        if self.weights is not None and not any(self.weights.values()):
            raise ConfigError("weights must give a domain a weight greater than 0; null: by tokens.")


@section("training")
class TrainingSection:
    """How long the model trains, and with which optimizer settings."""

    steps: Count
    """Optimizer steps."""
    batch_tokens: Count
    """Tokens per optimizer step over all ranks; a multiple of ranks x micro_batch x context."""
    context: CountOrZero = 0
    """Tokens per sequence. 0: the model's longest context, `max_position_embeddings` of most models."""
    micro_batch: Count = 8
    """Sequences per rank and micro-batch."""
    learning_rate: Positive = 3e-4
    """Learning rate at the end of the warm-up; a cosine lowers it from there."""
    warmup_steps: CountOrZero = 0
    """Steps of linear warm-up. 0: 2 % of the steps."""
    min_learning_rate_ratio: Share = 0.1
    """Learning rate of the last step, as a share of the largest."""
    weight_decay: NotNegative = 0.1
    """AdamW's weight decay; norms and biases have none."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's two betas."""
    gradient_clipping: NotNegative = 1.0
    """Norm that gradients are clipped to. 0: no clipping."""
    seed: Seed = 0
    """Seed of the initial weights and the order of the data, and of mocte.seed where that is not given."""
    checkpoint_every: CountOrZero = 0
    """Steps between checkpoints. 0: a tenth of the steps."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints that stay on the disk."""
    compile: bool = False
    """Whether torch.compile makes kernels of attention, norms, dense FFNs and the loss, which then holds no logits in
    fp32: a faster step and less memory, after a longer first step (docs/pretraining.md). Blocks' experts stay as they
    are. Not with ZeRO stage 3 or tensor parallelism."""

    def __post_init__(self) -> None:
        if len(self.betas) != 2:
            raise ConfigError(f"betas = {shown(self.betas)} must be two numbers in [0, 1).")


@section("evaluation")
class EvaluationSection:
    """How often the model is validated, and on how much."""

    every: CountOrZero = 0
    """Steps between validations. 0: a twentieth of the steps."""
    sequences_per_domain: Count = 8
    """Validation sequences per domain."""


@section("")
class RunConfig:
    """A run file with its defaults filled in."""

    model: ModelConfig
    """The model, one of transformers."""
    data: DataSection
    """What the model reads."""
    training: TrainingSection
    """How long the model trains, and with which optimizer settings."""
    evaluation: EvaluationSection
    """How often the model is validated, and on how much."""
    deepspeed: dict[str, Any]
    """DeepSpeed's own config with its "mocte" block; without the block the run is dense."""
    watch: WatchSection = field(default_factory=WatchSection)
    """What watches the run while it goes on."""
    init: str | None = None
    """`model.init`: checkpoint whose weights and modes a new run starts from, e.g. of tools/import_hf.py."""

    def __post_init__(self) -> None:
        if not self.training.context and self.model.max_positions == NO_LIMIT:
            raise ConfigError("training.context is missing: the model's config says nothing of a longest context.")
        if self.context > self.model.max_positions:
            raise ConfigError(
                f"training.context = {self.context} is longer than the model's longest context, "
                f"{self.model.max_positions} (max_position_embeddings of most models)."
            )
        if self.training.compile:
            _require_whole_matrices(self.deepspeed)
        if "mocte" in self.deepspeed:
            if self.model.bigram is not None:
                raise ConfigError(
                    "model.bigram is for dense runs, and deepspeed.mocte makes this one a mixture; remove one of them "
                    "(--set deepspeed.mocte=null is the dense twin)."
                )
            MocteConfig.from_dict(self.deepspeed["mocte"])

    def resolve(self, world_size: int, eod_id: int, vocab_size: int) -> dict[str, Any]:
        """The DeepSpeed config of this run: the file's, completed from the other sections.

        Args:
            world_size: ranks of the run; those of a tensor group read the same data.
            eod_id: token that ends a document.
            vocab_size: the tokenizer's.

        Raises:
            ConfigError: sizes that do not divide, or values that the sections contradict.
        """
        t, settings = self.training, copy.deepcopy(self.deepspeed)
        if vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {vocab_size} pieces, model.vocab_size is {self.model.vocab_size}; raise the "
                "model's, or train a smaller tokenizer."
            )
        data_ranks, left = divmod(world_size, tensor_ranks(settings))
        if left:
            raise ConfigError(
                f"deepspeed.tensor_parallel.autotp_size = {tensor_ranks(settings)} does not divide {world_size} ranks."
            )
        unit = data_ranks * t.micro_batch * self.context
        if t.batch_tokens % unit:
            near = max(1, round(t.batch_tokens / unit)) * unit
            raise ConfigError(
                f"training.batch_tokens = {t.batch_tokens} is not a multiple of {unit} = {data_ranks} ranks x "
                f"micro_batch {t.micro_batch} x context {self.context}; {near} would be."
            )
        derived = {
            "train_batch_size": t.batch_tokens // self.context,
            "train_micro_batch_size_per_gpu": t.micro_batch,
            "gradient_accumulation_steps": t.batch_tokens // unit,
            "gradient_clipping": t.gradient_clipping,
            "seed": t.seed,
        }
        _complete(settings, derived, "deepspeed")
        optimizer = settings.setdefault("optimizer", {"type": "AdamW"}).setdefault("params", {})
        rates = {"lr": t.learning_rate, "betas": list(t.betas), "weight_decay": t.weight_decay}
        _complete(optimizer, rates, "deepspeed.optimizer.params")
        settings.setdefault("scheduler", warmup_cosine(t.steps, self.warmup_steps, t.min_learning_rate_ratio))
        require_skippable(settings, "watch.skip_nonfinite", self.watch.skip_nonfinite)
        if "mocte" in settings:
            _complete(settings["mocte"], {"total_steps": t.steps}, "deepspeed.mocte")
            settings["mocte"].setdefault("eod_id", eod_id)
            settings["mocte"].setdefault("seed", t.seed)
            if settings["mocte"].get("log") is not None:
                raise ConfigError("deepspeed.mocte.log: the logs of a run file lie in --out; remove the key.")
            if settings["mocte"].get("peak_tflops") is not None:
                raise ConfigError("deepspeed.mocte.peak_tflops: a run file says it in watch.peak_tflops; move the key.")
            if settings["mocte"].get("skip_nonfinite"):
                raise ConfigError("deepspeed.mocte.skip_nonfinite: a run file says it in the section watch; move it.")
            MocteConfig.from_dict(settings["mocte"], world_size)
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
        # Where weights come from does not matter once there is a checkpoint; where they stand counts.
        free = ("activation_checkpointing", "pretrained")
        model = {f"model.{key}": value for key, value in model_facts(self.model).items() if key not in free}
        given = {**asdict(self.training), "context": self.context, "warmup_steps": self.warmup_steps}
        training = {f"training.{key}": value for key, value in given.items() if key not in FREE_TRAINING_KEYS}
        stage = (self.deepspeed.get("zero_optimization") or {}).get("stage", 0)
        deepspeed = {
            # Stages 1 and 2 differ in what they communicate, not in what they store.
            "deepspeed.zero_optimization.stage": "1 or 2" if stage in (1, 2) else stage,
            "deepspeed.optimizer.type": (self.deepspeed.get("optimizer") or {}).get("type", "AdamW"),
            "deepspeed.bf16.enabled": bool((self.deepspeed.get("bf16") or {}).get("enabled")),
            "deepspeed.fp16.enabled": bool((self.deepspeed.get("fp16") or {}).get("enabled")),
            "deepspeed.mocte is there": "mocte" in self.deepspeed,
        }
        data = {f"data.{key}": getattr(self.data, key) for key in ("weights", "document_mask")}
        return {**model, "model.init": self.init, **data, **training, **deepspeed}


def identity_defaults() -> dict[str, Any]:
    """Values of :meth:`RunConfig.identity` where nothing is said, key by key; keys that must be given are not there."""
    usual: dict[str, Any] = {"model.init": None, "data.weights": None, "data.document_mask": False}
    for place, cls in (("model", TransformersModel), ("training", TrainingSection)):
        usual |= {f"{place}.{f.name}": f.default for f in fields(cls) if f.default is not MISSING}
    return usual


def read_run(path: str | Path, changes: Sequence[str] = ()) -> RunConfig:
    """Read and check a run file.

    Args:
        path: YAML file with the sections model, data, training, evaluation, watch and deepspeed; or the name of a
            shipped one.
        changes: `section.key=value` each, value in YAML; they win over the file.

    Raises:
        ConfigError: unreadable file, unknown section or key (with the nearest valid one), wrong value, missing value.
    """
    path = shipped_file("runs", path)
    values = read_values(path, changes)
    allowed = [f.name for f in fields(RunConfig) if f.name != "init"]
    for name in values:
        if name not in allowed:
            raise ConfigError(
                f"{path}: unknown section '{name_shown(name)}' (value {shown(values[name])}).{nearest(name, allowed)} "
                f"Allowed: {', '.join(sorted(allowed))}."
            )
    sections: dict[str, Any] = {name: values.get(name) for name in ("data", "training", "evaluation", "watch")}
    model, init = _model(values.get("model"))
    return RunConfig(model=model, **sections, deepspeed=_deepspeed(values.get("deepspeed")), init=init)


def _model(values: Any) -> tuple[ModelConfig, str | None]:
    """The model, and the checkpoint that it starts from."""
    if not isinstance(values, dict | None):
        raise ConfigError(f"model must be a section with keys, not {shown(values)}.")
    section = dict(values or {})
    init = section.pop("init", None)
    if init is None:
        return _fresh(section), None
    if not isinstance(init, str) or not init:
        raise ConfigError(f"model.init = {shown(init)} must be the path of a folder of checkpoints.")
    return _started(section, init), init


def _started(section: dict[str, Any], init: str) -> ModelConfig:
    """The model of `model.init`; a size that the section gives must be its size."""
    for key in ("preset", "hf", "pretrained"):
        if key in section:
            raise ConfigError(f"model.{key} and model.init both say which model it is; remove model.{key}.")
    return parse_section(CheckpointModel, {**section, "base": base_in_checkpoint(init)})


def _fresh(section: dict[str, Any]) -> ModelConfig:
    if "preset" in section:
        return parse_section(TransformersModel, _from_preset(section))
    if "hf" not in section and "pretrained" not in section:
        raise ConfigError("model: one of preset, hf, pretrained and init must say which model it is; all are missing.")
    return parse_section(TransformersModel, section)


def _from_preset(section: dict[str, Any]) -> dict[str, Any]:
    """The keys `hf` and `activation_checkpointing` of a section with `preset`, whose other keys change the size."""
    from transformers import CONFIG_MAPPING

    for key in ("hf", "pretrained", "model_type"):
        if key in section:
            raise ConfigError(f"model.{key} and model.preset both say which model it is; remove one of them.")
    values = preset(section["preset"])
    changes = {key: value for key, value in section.items() if key not in ("preset", *OF_THE_RUN)}
    cls = CONFIG_MAPPING[values["model_type"]]
    require_known(cls, changes, "model")
    values |= {cls.attribute_map.get(key, key): value for key, value in changes.items()}
    config_from(values, "model")  # refused here, messages name keys as they stand in the file
    return {"hf": values, **{key: section[key] for key in OF_THE_RUN if key in section}}


def _deepspeed(section: Any) -> dict[str, Any]:
    if not isinstance(section, dict):
        raise ConfigError(f"deepspeed = {shown(section)} must be a DeepSpeed config or the path of one (JSON).")
    # `--set deepspeed.mocte=null`, the dense twin of a run, leaves the block out.
    return checked_settings(section, "deepspeed")


def _require_whole_matrices(settings: dict[str, Any]) -> None:
    """Refuse to compile what gathers weights or exchanges outputs inside of a region."""
    stage = (settings.get("zero_optimization") or {}).get("stage", 0)
    cut = {"zero_optimization.stage = 3": stage == 3, "tensor_parallel.autotp_size": tensor_ranks(settings) > 1}
    for name, there in cut.items():
        if there:
            raise ConfigError(f"training.compile does not work with deepspeed.{name}; set one of them otherwise.")


def _complete(section: dict[str, Any], derived: dict[str, Any], where: str) -> None:
    """Fill in what follows from the other sections; a value that says otherwise is a contradiction."""
    for key, value in derived.items():
        if section.setdefault(key, value) != value:
            raise ConfigError(
                f"{where}.{key} = {shown(section[key])} contradicts the sections of the run file, from which {value!r} "
                "follows; remove it there."
            )
