"""A model of any architecture of transformers as a folder: its own class while dense, and with experts ours around it.

The model is held in memory as a whole.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.base_model import make_config, make_dense, with_floats
from mocte_ds.checkpoints.source import NARROW, Source, empty_model, with_blocks
from mocte_ds.convert.hf.by_layer import ByLayer
from mocte_ds.convert.hf.shards import SHARD_BYTES
from mocte_ds.convert.hf.tokenizer import SpecialIds
from mocte_ds.convert.hf.user_keys import UserKeys
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block, BlockMode, running_state
from mocte_ds.moe.idle import free
from mocte_ds.remote_code.experts_mocte import GatheredFFN, sizes_of
from mocte_ds.shown import one_line

_ROUTER = (
    "kind",
    "weight",
    "learn",
    "top_k",
    "normalise",
    "scale",
    "unit_mean",
    "rows",
    "prior",
    "learn_prior",
    "groups",
    "std",
    "directions",
    "dropped",
)
_GATE = ".gate."
_BASE = "base."
_RENAMED = (
    (".deepspeed_moe.experts.deepspeed_experts.", ".experts."),
    (".deepspeed_moe.gate.", _GATE),
)
STATE = Path("the state of the run")
"""Names where values come from, in messages."""


class GatheredSource(Source):
    """The weights of a run that goes on, gathered on one rank."""

    def __init__(self, weights: dict[str, Tensor], base: dict[str, Any], mocte: dict[str, Any]) -> None:
        """Take the weights.

        Args:
            weights: by the names of a model whose experts lie on one rank.
            base: from :func:`mocte_ds.base_model.require_base`.
            mocte: "config", "blocks", "tokens" and "step", as in a checkpoint.

        Raises:
            CheckpointError: transformers do not make such a model.
        """
        blocks = [{key: entry[key] for key in ("name", "mode", "experts")} for entry in mocte["blocks"]]
        state = {"step": mocte["step"], "tokens": mocte["tokens"], "mocte": mocte["config"], "blocks": blocks}
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            model = empty_model(base, mocte, STATE)
        super().__init__(model, {**state, "base": base, "tokenizer": None})
        self._weights = weights
        different = self.shapes.keys() ^ weights.keys()
        if different:
            raise CheckpointError(
                f"{min(different)} is in only one of two: the {base['architecture']} that trains, and the one that its "
                "config makes. A model that was changed after it was made cannot be exported."
            )

    def _stored(self, name: str) -> Tensor:
        return self._weights[name]


@dataclass(frozen=True)
class Target:
    """What a model is stored as."""

    architecture: str
    """Name of the class."""
    names: dict[str, str]
    """Name of each tensor of the class, and of ours."""
    reason: str | None = None
    """Why it is not a stock class."""
    special: SpecialIds = SpecialIds(None, None, None)
    """Ids for the configs where the base model's names none."""
    user_keys: UserKeys = field(default_factory=UserKeys)
    """Routing keys of the user's own."""


def choose_target(source: Source, choice: str) -> Target:
    """The base model's own class, or ours around it where experts have emerged.

    Args:
        source: of the user's own model.
        choice: `own`: ours in any case.

    Raises:
        CheckpointError: a routing key of the user's own cannot go along.
    """
    emerged, base = source.emerged, source.base
    own = choice == "own" or bool(emerged)
    prefix, names = _BASE if own else "", {}
    blocks = [m for m in source.model.modules() if isinstance(m, Block)]
    for name in source.shapes:
        if (new := _stored_name(name, blocks)) is not None:
            names[prefix + new] = name
    architecture = "MocteBlocksForCausalLM" if own else base["architecture"]
    return Target(architecture, names, user_keys=UserKeys.of(emerged))


def save_model(source: Source, target: Target, folder: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Write what `save_pretrained` of the class writes: config, generation config, weights, and code if it is ours.

    Returns:
        Parameters, tied ones once.

    Raises:
        CheckpointError: the tensors are not those of the class.
    """
    from transformers import PreTrainedModel

    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        model = empty_class(source, target)
        weights = {name: tensor_of(source, ours) for name, ours in target.names.items()}
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            text = one_line(error, 500)
            raise CheckpointError(f"the weights do not fit a {target.architecture}: {text}") from error
        model.tie_weights()
        generation = model.generation_config if model.can_generate() else None
        if generation is not None:
            generation = generation_of(source, generation)
        for config in (model.config, model.config.get_text_config(), generation):
            for name, number in target.special.fields().items():
                if config is not None and getattr(config, name, None) is None:
                    setattr(config, name, number)
        # Our class refuses to leave out the files of keys, which come next.
        save = PreTrainedModel.save_pretrained if target.user_keys.files else type(model).save_pretrained
        save(model, folder, max_shard_size=shard_bytes)
        target.user_keys.write(folder)
        if generation is not None:
            # Not by the model, which refuses what some published models say, such as top_k without do_sample.
            generation.to_json_file(folder / "generation_config.json")
        return sum(parameter.numel() for parameter in model.parameters())


def generation_of(source: Source, usual: Any) -> Any:
    """The generation config that the base model had, or one that follows from a model's config."""
    stored = source.base.get("generation")
    return usual if stored is None else type(usual).from_dict(with_floats(stored))


def trained_model(source: Source) -> Any:
    """The model as it trains, with its blocks and all experts, in fp32 and in evaluation mode."""
    found = trained_by_layer(source)
    found.load(found.model)
    return found.model


@torch.no_grad()
def trained_by_layer(source: Source) -> ByLayer:
    """:func:`trained_model` with weights that stay where the source has them."""
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        inside = tuple(f"{block.name}." for block in source.blocks)
        # Tensors of which every number is the same one: they take no memory, and give way to the weights.
        around = {n: torch.zeros(()).expand(shape) for n, shape in source.shapes.items() if not n.startswith(inside)}
        config = make_config(source.base, STATE)
        # What is neither a weight nor in a checkpoint, such as tables of positions, comes from the class.
        how = {"state_dict": around, "dtype": torch.float32}
        model: Any = make_dense(
            lambda few: type(source.model).from_pretrained(None, config=few, **how), config, source.base, STATE
        )
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(parameter.to("meta"), requires_grad=False))
        if source.state["mocte"] is not None:
            with_blocks(model, {"config": source.state["mocte"], "blocks": source.state["blocks"]}, STATE)
        for block in (module for module in model.modules() if isinstance(module, Block)):
            for path in block.idle:
                free(block.parts[path])
        if different := running_state(model).keys() ^ source.shapes.keys():
            raise CheckpointError(f"{min(different)} is in only one of two: the trained model and its checkpoint.")
        model.tie_weights()
        return ByLayer(model.eval(), source.shapes, source.read)


def tensor_of(source: Source, name: str) -> Tensor:
    """One of our tensors as it is stored: gates, and integers, as they are, everything else in the source's dtype."""
    return source.rounded(name)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it transformers show no progress and report nothing, and make whole models under ZeRO stage 3, too.

    They would spread the model over the ranks, of which only one is here.
    """
    from transformers.integrations import deepspeed as told
    from transformers.utils import logging

    shown, settings = logging.is_progress_bar_enabled(), getattr(told, "_hf_deepspeed_config_weak_ref", None)
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what was lost and what was found is checked here
    told._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        told._hf_deepspeed_config_weak_ref = settings
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _stored_name(name: str, blocks: list[Block]) -> str | None:
    """Name of one of our tensors in the class, after its prefix; None for a gate that no token has passed yet."""
    block = next((block for block in blocks if name.startswith(f"{block.name}.")), None)
    if block is None:
        return name
    if block.mode is BlockMode.WARMUP:
        return block.names_outside.get(name)
    for ours, theirs in _RENAMED:
        name = name.replace(ours, theirs, 1)
    return name


def empty_class(source: Source, target: Target) -> Any:
    """A model of the class on the meta device."""
    from mocte_ds.convert.hf.register import MocteBlocksConfig, MocteBlocksForCausalLM

    base = source.base
    config = make_config(base, STATE)
    dtype = NARROW.get(source.dtype, torch.float32)
    with torch.device("meta"):
        if target.architecture == base["architecture"]:
            return make_dense(lambda few: type(source.model)._from_config(few, dtype=dtype), config, base, STATE)
        around = MocteBlocksConfig(
            text_config=config,
            dense_ffns=base.get("dense_ffns"),
            blocks=[_described(block) for block in source.emerged],
            document_end_id=(source.state["mocte"] or {}).get("eod_id"),
            user_keys=target.user_keys.files,
        )
        return MocteBlocksForCausalLM._from_config(around, dtype=dtype)


def _described(block: Block) -> dict[str, Any]:
    """A block as the config of the own class has it."""
    first = block.banks[0]
    keys = [bank.gate.key for bank in block.banks]
    parts = [name for name, _ in block.dense.named_children()] if isinstance(block.dense, GatheredFFN) else None
    settings = [dict.fromkeys((*_ROUTER, *key.taken())) for key in keys]
    return {
        "module": block.name,
        **({"parts": parts} if parts else {}),
        "kind": block.kind,
        "hidden_size": block.hidden_size,
        "num_experts": first.num_experts,
        "expert_sizes": sizes_of(first.local_experts[0], block.dense),
        "vocab_size": max(key.vocab_size for key in keys) or None,
        "banks": [
            {name: getattr(bank.gate.router, name) for name in names}
            for bank, names in zip(block.banks, settings, strict=True)
        ],
    }
