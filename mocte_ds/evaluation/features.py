"""Reads the features of a checkpoint on held-out text: what its FFNs read, and what its attention gives."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.data.loader import BlendedLoader
from mocte_ds.data.manifest import Manifest
from mocte_ds.errors import CheckpointError, ConfigError, DataError
from mocte_ds.evaluation.live import load_live
from mocte_ds.evaluation.replicas import Replicas
from mocte_ds.moe.attach import find_ffns

FFN, ATTENTION = "FFN's input", "attention's output"
_BLOCK = "MocteBlock"
"""Name of the modules that stand for an FFN in the class around a base model."""
_BATCH = 32


@dataclass(frozen=True)
class Features:
    """Of S sequences of T tokens."""

    rows: dict[tuple[str, str], Tensor]
    """(S, T, d) fp32 by the FFN's name and by :data:`FFN` or :data:`ATTENTION`."""
    source: Tensor
    """(S,) number of each sequence's domain."""
    domains: list[str]


@torch.no_grad()
def read_features(
    checkpoint: str | Path, prepared: str | Path, sequences: int, attention: bool = True, seed: int = 0
) -> Features:
    """Run a checkpoint over validation text, each sequence once, the domains in proportion to their tokens.

    Args:
        checkpoint: a run's folder of checkpoints (its latest is taken), or the folder of one.
        prepared: folder made by tools/prepare_data.py with the tokenizer of the run.
        sequences: S.
        attention: whether the attention of the same layers is read too, where a layer has a module for it.
        seed: of the order of the text.

    Raises:
        CheckpointError: no checkpoint, or one that is damaged or has another vocabulary than the data.
        DataError: no prepared data, or less validation text than that.
        ConfigError: the model has no FFN that is known by its shape.
    """
    network, _ = load_live(Path(checkpoint), None, Replicas.of(1))
    text = network.config.get_text_config()
    context, manifest = int(text.max_position_embeddings), Manifest.read(prepared)
    if manifest.vocab_size > text.vocab_size:
        raise CheckpointError(
            f"{prepared} has a vocabulary of {manifest.vocab_size} tokens and the model only {text.vocab_size}: it was "
            "prepared for another one."
        )
    there = sum(max(0, facts["validation"]["tokens"] - 1) // context for facts in manifest.domains.values())
    if not 2 <= sequences <= there:
        raise DataError(
            f"{sequences} sequences: {prepared} has {there} of {context} tokens for validation; take 2 or more of them."
        )
    size = next(n for n in range(min(_BATCH, sequences), 0, -1) if sequences % n == 0)
    loader = BlendedLoader(prepared, "validation", context, size, 0, 1, size, seed)
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    network = network.to(device)
    sites = _sites(network, attention)
    found: dict[tuple[str, str], Tensor] = {}
    source = []
    with _listening(sites) as heard:
        for number, batch in zip(range(sequences // size), loader, strict=False):
            network(input_ids=batch["input_ids"].to(device), use_cache=False)
            for key, rows in heard.items():
                if key not in found:
                    found[key] = torch.empty(sequences, context, rows.shape[-1])
                found[key][number * size : (number + 1) * size] = rows
            source.append(batch["domain"])
    return Features(found, torch.cat(source), loader.domains)


def _sites(network: nn.Module, attention: bool) -> dict[tuple[str, str], nn.Module]:
    """The modules that are listened to."""
    blocks = [name for name, module in network.named_modules() if type(module).__name__ == _BLOCK]
    dense: list[str] = []
    with contextlib.suppress(ConfigError if blocks else ()):
        dense = [name for name in find_ffns(network) if not any(name.startswith(f"{block}.") for block in blocks)]
    wanted = {*blocks, *dense}
    sites: dict[tuple[str, str], nn.Module] = {}
    for name in [name for name, _ in network.named_modules() if name in wanted]:
        shown = name.removeprefix("base.")
        sites[shown, FFN] = network.get_submodule(name)
        layer = network.get_submodule(name.rpartition(".")[0])
        near = [child for child in layer.children() if "attention" in type(child).__name__.lower()]
        if attention and near:
            sites[shown, ATTENTION] = near[0]
    return sites


@contextlib.contextmanager
def _listening(sites: dict[tuple[str, str], nn.Module]) -> Iterator[dict[tuple[str, str], Tensor]]:
    """What each module read (an FFN) or gave (attention) in the last call, (B, T, d) on the CPU."""
    heard: dict[tuple[str, str], Tensor] = {}

    def listen(key: tuple[str, str]) -> Any:
        def hook(_module: nn.Module, args: tuple, output: Any) -> None:
            value = args[0] if key[1] == FFN else output[0] if isinstance(output, tuple) else output
            heard[key] = value.detach().float().cpu()

        return hook

    hooks = [module.register_forward_hook(listen(key)) for key, module in sites.items()]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()
