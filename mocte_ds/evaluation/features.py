"""Reads the features of a checkpoint on held-out text: what its FFNs read, and what its attention gives."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mocte_ds.data.loader import BlendedLoader
from mocte_ds.data.manifest import Manifest
from mocte_ds.errors import CheckpointError, ConfigError, DataError
from mocte_ds.evaluation.live import load_live
from mocte_ds.evaluation.replicas import Replicas
from mocte_ds.evaluation.routes import BLOCK
from mocte_ds.moe.attach import find_ffns

K = TypeVar("K")
T = TypeVar("T")

FFN, ATTENTION = "FFN's input", "attention's output"
_BATCH = 32


@dataclass(frozen=True)
class Features:
    """Of S sequences of T tokens."""

    rows: dict[tuple[str, str], Tensor]
    """(S, T, d) fp32 by the FFN's name and by :data:`FFN` or :data:`ATTENTION`."""
    source: Tensor
    """(S,) number of each sequence's domain."""
    domains: list[str]


class Reader:
    """A checkpoint and validation text, each sequence once, the domains in proportion to their tokens."""

    def __init__(self, checkpoint: str | Path, prepared: str | Path, sequences: int, seed: int = 0) -> None:
        """Load both; arguments and errors as of :func:`read_features`."""
        network, _ = load_live(Path(checkpoint), None, Replicas.of(1))
        text = network.config.get_text_config()
        self.context, manifest = int(text.max_position_embeddings), Manifest.read(prepared)
        if manifest.vocab_size > text.vocab_size:
            raise CheckpointError(
                f"{prepared} has a vocabulary of {manifest.vocab_size} tokens and the model only {text.vocab_size}: it "
                "was prepared for another one."
            )
        tokens = [facts["validation"]["tokens"] for facts in manifest.domains.values()]
        there = sum(max(0, count - 1) // self.context for count in tokens)
        if not 2 <= sequences <= there:
            raise DataError(
                f"{sequences} sequences: {prepared} has {there} of {self.context} tokens for validation; take 2 or "
                "more of them."
            )
        self.size = next(n for n in range(min(_BATCH, sequences), 0, -1) if sequences % n == 0)
        self._count = sequences // self.size
        self._loader = BlendedLoader(prepared, "validation", self.context, self.size, 0, 1, self.size, seed)
        self.domains = self._loader.domains
        self._device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        self.network = network.to(self._device)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """input_ids, labels (B, T) and domain (B,) of all sequences, on the model's device."""
        for _, batch in zip(range(self._count), self._loader, strict=False):
            yield {name: value.to(self._device) for name, value in batch.items()}


@torch.no_grad()
def read_features(
    checkpoint: str | Path, prepared: str | Path, sequences: int, attention: bool = True, seed: int = 0
) -> Features:
    """Run a checkpoint over validation text.

    Args:
        checkpoint: a run's folder of checkpoints (its latest is taken), or the folder of one.
        prepared: folder made by tools/prepare_data.py with the tokenizer of the run.
        sequences: S.
        attention: whether the attention of the same layers is read too, where a layer has a module for it.
        seed: of the order of the text.

    Raises:
        CheckpointError: no checkpoint, or one that is damaged or has a smaller vocabulary than the data.
        DataError: no prepared data, or less validation text than that.
        ConfigError: the model has no FFN that is known by its shape.
    """
    reader = Reader(checkpoint, prepared, sequences, seed)
    paths = {key: path for key, path in ffn_sites(reader.network).items() if attention or key[1] == FFN}
    sites = {key: reader.network.get_submodule(path) for key, path in paths.items()}
    found: dict[tuple[str, str], Tensor] = {}
    source = []
    with listening(sites, _feature) as heard:
        for number, batch in enumerate(reader.batches()):
            reader.network(input_ids=batch["input_ids"], use_cache=False)
            for key, rows in heard.items():
                if key not in found:
                    found[key] = torch.empty(sequences, reader.context, rows.shape[-1])
                found[key][number * reader.size : (number + 1) * reader.size] = rows
            source.append(batch["domain"].cpu())
    return Features(found, torch.cat(source), reader.domains)


def ffn_sites(network: nn.Module) -> dict[tuple[str, str], str]:
    """Paths of what stands for each FFN, by its name and FFN, and of the attention beside it, by ATTENTION.

    Raises:
        ConfigError: there is no FFN.
    """
    blocks = [name for name, module in network.named_modules() if type(module).__name__ == BLOCK]
    dense: list[str] = []
    try:
        dense = [name for name in find_ffns(network) if not any(name.startswith(f"{block}.") for block in blocks)]
    except ConfigError:
        if not blocks:
            raise
    wanted = {*blocks, *dense}
    sites: dict[tuple[str, str], str] = {}
    for path in [path for path, _ in network.named_modules() if path in wanted]:
        name, layer = path.removeprefix("base."), path.rpartition(".")[0]
        sites[name, FFN] = path
        for child, module in network.get_submodule(layer).named_children():
            if "attention" in type(module).__name__.lower():
                sites.setdefault((name, ATTENTION), f"{layer}.{child}")
    return sites


@contextlib.contextmanager
def listening(modules: Mapping[K, nn.Module], take: Callable[[K, tuple, Tensor], T]) -> Iterator[dict[K, T]]:
    """Context manager: what ``take`` makes of each module's last call: of its key, arguments and output."""
    heard: dict[K, T] = {}

    def listen(key: K) -> Any:
        def hook(_module: nn.Module, args: tuple, output: Any) -> None:
            heard[key] = take(key, args, output[0] if isinstance(output, tuple) else output)

        return hook

    hooks = [module.register_forward_hook(listen(key)) for key, module in modules.items()]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _feature(site: tuple[str, str], args: tuple, output: Tensor) -> Tensor:
    """(B, T, d) on the CPU: what an FFN read, or attention gave."""
    return (args[0] if site[1] == FFN else output).detach().float().cpu()
