"""Puts blocks into any model: every module that matches a pattern is replaced by a block around it."""

import contextlib
import difflib
import fnmatch
import inspect
import logging
import os
from collections import Counter
from collections.abc import Callable

from torch import nn

from mocte_ds.config import MocteConfig
from mocte_ds.errors import ConfigError
from mocte_ds.moe.block import Block
from mocte_ds.moe.context import BatchContext
from mocte_ds.moe.ffn_shape import FORMS, ffn_shape, is_additive
from mocte_ds.moe.idle import require_unshared
from mocte_ds.moe.keys import key_class
from mocte_ds.moe.loose import gather_named, gathered, loose_ffns
from mocte_ds.remote_code.experts_mocte import ffn_of

AUTO = "auto"
"""Value of `modules` that stands for every FFN of the model."""


def attach(model: nn.Module, config: MocteConfig, let_wait: Callable[[nn.Module], None] | None = None) -> list[Block]:
    """Replace the FFNs that ``config.modules`` names by blocks, in the order of the model.

    Args:
        model: any model; changed in place.
        config: the "mocte" block; with ep_size 1 no process group is needed.
        let_wait: called with the experts of each block as soon as they are made, which have not been born yet; None:
            they keep their memory.

    Returns:
        The blocks.

    Raises:
        ConfigError: a pattern matches nothing, a match lies inside another one, is not an FFN or shares weights, or the
            model is an encoder-decoder. Then the model may have gathered FFNs, and computes what it did.
    """
    _require_one_stream(model)
    names = matching_modules(model, config.modules)
    if config.modules == AUTO and os.environ.get("RANK", "0") == "0":
        # A warning, because nobody sees less by default.
        logging.getLogger("mocte_ds").warning(f"mocte.modules = '{AUTO}': blocks at {summary(names)}.")
    gather_named(model, names)
    require_unshared(model, {name: model.get_submodule(name) for name in names})
    context = BatchContext(config.eod_id)
    context.follow(model, names)
    kinds = [router.kind for router in config.routers if key_class(router.kind).reads_ids]
    vocab_size = _vocab_size(model, kinds[0]) if kinds else None
    blocks = []
    for name in names:
        ffn = model.get_submodule(name)
        _require_one_argument(ffn, name)
        block = Block(name, ffn, config, context, vocab_size).train(ffn.training)
        if let_wait:
            for part in block.idle:
                let_wait(block.parts[part])
        model.set_submodule(name, block)
        block.layer = layer_number(model, block)
        blocks.append(block)
    return blocks


def stack_of(model: nn.Module, block: Block) -> tuple[str, nn.ModuleList] | None:
    """Path and members of the outermost list of modules that a block lies in, which is the model's layers; or None."""
    for path, part in model.named_modules():
        # By its path too: a model may have a second list of some of its layers.
        if isinstance(part, nn.ModuleList) and block.name.startswith(f"{path}.") and holds(part, block):
            return path, part
    return None


def layer_number(model: nn.Module, block: Block) -> int | None:
    """Number of the model's layer that a block lies in, from 0; None if its layers are not in an nn.ModuleList."""
    stack = stack_of(model, block)
    return next(number for number, layer in enumerate(stack[1]) if holds(layer, block)) if stack else None


def holds(module: nn.Module, block: Block) -> bool:
    """Whether a block lies in a module."""
    return any(part is block for part in module.modules())


def matching_modules(model: nn.Module, patterns: str | list[str]) -> list[str]:
    """Names of the modules that match; every pattern must match at least one. :data:`AUTO` finds all FFNs.

    Where a layer calls the matrices of its FFN itself, the first matrix stands for it until it is gathered.

    Raises:
        ConfigError: see :func:`attach`.
    """
    if patterns == AUTO:
        return find_ffns(model)
    all_names = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # `*` stands for one step of the path: model.layers.*.mlp must not match model.layers.0.mlp.act.mlp.
        matches = [
            name for name in all_names if name.count(".") == pattern.count(".") and fnmatch.fnmatchcase(name, pattern)
        ]
        if not matches:
            ffns = [name for name, module in model.named_modules() if ffn_shape(module) is not None]
            with contextlib.suppress(ConfigError):
                ffns = ffns or find_ffns(model)
            near = difflib.get_close_matches(pattern, all_names, n=3, cutoff=0.4)
            candidates = f"FFNs in this model: {', '.join(ffns[:4])}, ..." if ffns else f"Nearest names: {near}."
            raise ConfigError(f"mocte.modules pattern '{pattern}' matches no module of the model. {candidates}")
        found.update(matches)
    for name in found:
        if "expert" in name:
            raise ConfigError(
                f"mocte.modules matches '{name}': DeepSpeed loses buffers of modules with 'expert' in their path when "
                "it saves; rename the module."
            )
        outer = [other for other in found if name.startswith(other + ".")]
        if outer:
            raise ConfigError(f"mocte.modules matches '{name}' inside of '{outer[0]}'; name only one of them.")
    return [name for name in all_names if name in found]


def find_ffns(model: nn.Module) -> list[str]:
    """Names of all FFNs in a model's lists of layers: of an FFN's shape, with hidden units that add up to the output.

    Raises:
        ConfigError: there is none; says what stands in the way where a layer calls matrices itself.
    """
    found: list[str] = []
    obstacles: list[str] = []
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
    layers = {member for members in lists for member in members}
    in_lists = {part for layer in layers for part in layer.modules()}
    for name, part in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if inside or "expert" in name or part not in in_lists:
            continue
        if _is_additive(part):
            found.append(name)
        elif part in layers:
            obstacles += [f" {loose.obstacle}." for loose in loose_ffns(part) if loose.obstacle]
            found += [f"{name}.{parts[0]}" for parts in gathered(part) if _is_additive(ffn_of(part, parts))]
    if not found:
        raise ConfigError(
            f"mocte.modules = '{AUTO}' finds no FFN in {type(model).__name__}. One is a module of its own, in a list "
            f"of layers, with {FORMS}; or two matrices d -> f -> d of a layer, which calls nothing but modules between "
            f"them.{''.join(obstacles[:1])} Name the modules, or put the matrices into a module first."
        )
    return [name for name, _ in model.named_modules() if name in found]


def _is_additive(module: nn.Module) -> bool:
    shape = ffn_shape(module)
    return shape is not None and is_additive(module, shape)


def summary(names: list[str]) -> str:
    """``model.layers.*.mlp (12)`` for modules that differ by numbers in their paths alone."""
    counts = Counter(".".join("*" if step.isdigit() else step for step in name.split(".")) for name in names)
    return ", ".join(f"{pattern} ({count})" for pattern, count in counts.items())


def _require_one_argument(ffn: nn.Module, name: str) -> None:
    """Refuse, before the first step, an FFN that reads something besides the feature, e.g. the residual as in BLOOM."""
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(ffn.forward).parameters.values()
    needed = [p.name for p in parameters if p.kind in named and p.default is p.empty]
    if len(needed) > 1:
        raise ConfigError(
            f"mocte.modules matches {name} ({type(ffn).__name__}), whose forward needs {', '.join(needed)}; a block "
            "gives its FFN the feature alone. Name a module inside it that reads nothing else."
        )


def _require_one_stream(model: nn.Module) -> None:
    """Refuse a model that reads two sequences: the mask and ids of one would be taken for those of the other.

    Raises:
        ConfigError: it says that it is an encoder-decoder, or its forward takes `decoder_input_ids`.
    """
    says = getattr(getattr(model, "config", None), "is_encoder_decoder", False) is True
    if says or "decoder_input_ids" in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"{type(model).__name__} is an encoder-decoder, which mocte_ds does not support: padding, token counts and "
            "the probe set follow one sequence of tokens, `input_ids`. Decoder-only and encoder-only models are "
            "supported."
        )


def _vocab_size(model: nn.Module, kind: str) -> int:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.num_embeddings
    raise ConfigError(
        f"router.kind '{kind}' reads token ids, and {type(model).__name__} has no token embedding (nn.Embedding); take "
        "a kind that reads features, such as 'token'."
    )
