"""The model around the blocks in plain values: what transformers need to make it again, kept in every checkpoint."""

import copy
import json
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from mocte_ds.bigrams import bigrams_of, put_bigrams, require_bigrams
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.remote_code.experts_mocte import put_dense_ffns
from mocte_ds.shown import one_line, shown
from mocte_ds.value_bounds import require_plain

MOST_BYTES = 1 << 20
"""Of a config as text; those of published models have some 2,000."""

REFUSED = "refused"
"""Key of the reason why nothing is kept."""
_KEYS = ("architecture", "model_type", "config")
_DENSE = "dense_ffns"
_BIGRAM = "bigram"
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Keys of the number of experts, in the configs of transformers."""
_LEFT_OUT = ("_name_or_path", "architectures", "auto_map", "transformers_version")


def base_facts(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint keeps of the model that the user has handed over.

    Nothing here stops a training: what cannot be kept is told when somebody wants to export the model.

    Args:
        model: with or without blocks.

    Returns:
        "architecture" (name of the class), "model_type", "config" and "generation" (values of its two configs, as
        JSON has them), "dense_ffns" (hidden units of the dense FFNs that stand where the class has experts of its own,
        by their paths), with a table of hashed pairs "bigram" (what it takes to make it again); or "refused": why they
        cannot be kept.
    """
    transformers = sys.modules.get("transformers.modeling_utils")  # there, if the model is one of theirs
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return {
            REFUSED: f"the model is a {type(model).__module__}.{type(model).__qualname__}, which is not a model of "
            "transformers (PreTrainedModel)"
        }
    name = type(model).__name__
    try:
        config = config_values(model.config, f"the config of {name}")
        generation = getattr(model, "generation_config", None)
        values = None if generation is None else config_values(generation, f"the generation config of {name}")
    except Exception as error:  # a config is whatever its author has made of it
        return {REFUSED: f"the config of {name} cannot be kept in plain values: {error}"}
    facts = {"architecture": name, "model_type": model.config.model_type, "config": config, "generation": values}
    bigrams = bigrams_of(model)
    return {**facts, _DENSE: dict(getattr(model, _DENSE, {})), **({_BIGRAM: bigrams.facts} if bigrams else {})}


def refuse_saving_alone(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a model with blocks raise, and that of every part of it that could be saved by itself:
    it would write the experts of one rank, under names that transformers pass over when they load the folder, and
    nothing of what ZeRO stage 3 has partitioned.
    """
    for part in model.modules():
        if hasattr(part, "save_pretrained"):
            part.save_pretrained = _refuse_to_save  # type: ignore[assignment]


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise CheckpointError(
        "save_pretrained of a model with blocks would write a part of it: its experts lie on all ranks. Call "
        "engine.mocte.export(FOLDER) on all ranks, or save_model of mocte_ds.integrations.transformers.MocteTrainer."
    )


def require_base(facts: Any, where: object) -> dict[str, Any]:
    """What :func:`base_facts` has returned, if a model can be made of it.

    Args:
        facts: of a checkpoint; None where there are none.
        where: names it, for messages.

    Raises:
        CheckpointError: nothing was kept, and why; or something else than a base model.
    """
    if facts is None:
        raise CheckpointError(
            f"{where} does not say which model it holds: neither launch/pretrain.py nor this version of mocte_ds has "
            "written it; save it again in the script that trains it."
        )
    if isinstance(facts, dict) and REFUSED in facts:
        raise CheckpointError(f"{where} does not say which model it holds: {str(facts[REFUSED])[:500]}.")
    texts = isinstance(facts, dict) and all(isinstance(facts.get(key), str) for key in _KEYS[:2])
    if not texts or not isinstance(facts.get("config"), dict):
        raise CheckpointError(f"{where} has no {', '.join(_KEYS)} of its base model; it is damaged.")
    widths = facts.get(_DENSE, {})
    if not isinstance(widths, dict) or any(type(width) is not int or width < 1 for width in widths.values()):
        raise CheckpointError(f"{where}: {_DENSE} of its base model are not widths of FFNs; it is damaged.")
    require_bigrams(facts.get(_BIGRAM), where)
    try:
        require_plain(facts, "base")
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return facts


def make_config(base: dict[str, Any], where: object) -> Any:
    """The config of the base model, as transformers have it.

    Args:
        base: from :func:`require_base`.
        where: names it, for messages.

    Raises:
        CheckpointError: this version of transformers, or this script, has no such config.
    """
    from transformers import CONFIG_MAPPING

    kind = base["model_type"]
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{where} holds a {base['architecture']} (model_type {kind!r:.80}), which this version of transformers "
            "does not know; register its config and class with AutoConfig and AutoModelForCausalLM first."
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(with_floats(base["config"]))
    except Exception as error:  # transformers raise many types for values that they do not take
        raise CheckpointError(f"{where}: transformers refuse the config of its {kind}: {str(error)[:300]}") from error


def make_model(base: dict[str, Any], where: object) -> nn.Module:
    """The base model without weights, on the meta device.

    Args:
        base: from :func:`require_base`.
        where: names it, for messages.

    Raises:
        CheckpointError: transformers have no causal language model of this config, or it is of another class.
    """
    import torch

    config = make_config(base, where)
    try:
        with torch.device("meta"):
            model = make_dense(_of_config, config, base, where)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raise many types for values that they do not take
        text = one_line(error)
        raise CheckpointError(f"{where}: transformers make no {base['architecture']} of its config: {text}") from error
    if type(model).__name__ != base["architecture"]:
        raise CheckpointError(
            f"{where} holds a {base['architecture']}; only causal language models can be exported, and transformers "
            f"make a {type(model).__name__} of its config. If it is a class of your own, register it with "
            "AutoModelForCausalLM first."
        )
    return model


def _of_config(config: Any) -> nn.Module:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def make_dense(make: Callable[[Any], nn.Module], config: Any, base: dict[str, Any], where: object) -> Any:
    """A base model of its config, with its table of hashed pairs, if it has one; where an imported mixture has experts
    of its own, dense FFNs stand.

    Args:
        make: a model of a config of transformers.
        config: of the base model.
        base: from :func:`require_base`.
        where: names it, for messages.

    Raises:
        CheckpointError: the model has no module of such a path, or no hidden size.
    """
    widths = base.get(_DENSE, {})
    if not widths:
        return put_bigrams(make(config), base.get(_BIGRAM))
    # The class's own experts take no memory worth the name before they go.
    few = copy.deepcopy(config)
    text = few.get_text_config()
    counts = {key: getattr(text, key) for key in _COUNTS if getattr(text, key, None) is not None}
    for key in counts:
        setattr(text, key, 1)
    model = make(few)
    try:
        put_dense_ffns(model, widths, text.hidden_size)
    except (AttributeError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where}: its base model has no such {_DENSE}: {one_line(error)}") from error
    for key, value in counts.items():
        setattr(model.config.get_text_config(), key, value)
    model.config.output_router_logits = False  # there are no routers of the class any more
    return put_bigrams(model, base.get(_BIGRAM))


def changes_context(config: Any) -> bool:
    """Whether the longest context of a config may be changed: positions are computed, and by a rule without one."""
    rope = getattr(config.get_text_config(), "rope_parameters", None)
    if not isinstance(rope, dict):
        return False
    kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope]  # by kind of layer, in some classes
    return all(kind.get("rope_type", "default") in ("default", "linear", "llama3") for kind in kinds)


def longest_context(config: Any, where: object) -> int | None:
    """Longest context of a config of transformers, in tokens; None where it says nothing.

    Args:
        config: of any model.
        where: names it, for messages.

    Raises:
        CheckpointError: a number that no context has.
    """
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    if found is None:
        return None
    if type(found) is not int or found < 1:
        raise CheckpointError(
            f"{where}: max_position_embeddings = {shown(found)} must be a number of tokens, 1 or more."
        )
    return found


def with_floats(value: Any) -> Any:
    """Values with the infinite numbers that transformers write as texts."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: with_floats(item) for key, item in value.items()}
    return [with_floats(item) for item in value] if isinstance(value, list) else value


def config_values(config: Any, what: str) -> dict[str, Any]:
    """Values of a config of transformers, as its JSON file would have them.

    Infinite numbers stand as :func:`with_floats` reads them.

    Raises:
        TypeError: it holds objects that JSON does not have.
        ValueError: it is too large, or holds numbers and texts that nothing reads back.
    """
    text = config.to_json_string(use_diff=False)
    if len(text) > MOST_BYTES:
        raise ValueError(f"{what} has {len(text):,} characters, and {MOST_BYTES:,} are the most")
    values = {key: value for key, value in json.loads(text).items() if key not in _LEFT_OUT}
    require_plain(values, what)
    return values
