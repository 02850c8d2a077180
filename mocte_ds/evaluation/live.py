"""The checkpoint of a run as a model that is scored: the exported class, filled from the checkpoint's files.

Its experts may be spread over the ranks of a replica. All of them see the same tokens, each runs its own experts, and
the outputs are added up: a token's other experts give zeros.
"""

import functools
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.base_model import with_floats
from mocte_ds.bigrams import with_bigrams
from mocte_ds.checkpoints.place import find_tag
from mocte_ds.checkpoints.source import NARROW, CheckpointSource
from mocte_ds.convert.hf.kept_tokenizer import run_tokenizer
from mocte_ds.convert.hf.tokenizer import SpecialIds
from mocte_ds.convert.hf.trained import choose_target, empty_class, quiet_transformers, tensor_of
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.evaluation.network import folder_tokenizer
from mocte_ds.evaluation.replicas import Replicas
from mocte_ds.shown import one_line

_NO_LIMIT = 1 << 30
_EXPERT = re.compile(r"(.*\.banks\.\d+\.experts)\.(\d+)\.")
_BANK = "MocteBank"
"""Name of the modules that hold experts in the class around a base model."""


def load_live(
    checkpoint: Path, tokenizer: str | Path | None, replicas: Replicas, dtype: str = "fp32"
) -> tuple[Any, Any]:
    """Load a model and its tokenizer; optimizer states are not read.

    Args:
        checkpoint: a run's folder of checkpoints (its latest is taken), or the folder of one.
        tokenizer: sentencepiece model, or a folder with a tokenizer.json; None: the one of the run.
        replicas: over whose ranks the experts are spread.
        dtype: `fp32`, `bf16` or `fp16`; gates keep their precision.

    Returns:
        The model on the CPU in evaluation mode, and the tokenizer.

    Raises:
        CheckpointError: missing, damaged or unknown files, a router that the class does not have, or no tokenizer.
        ConfigError: settings that this version does not know, or an unknown dtype.
    """
    if dtype not in ("fp32", *NARROW):
        raise ConfigError(f"dtype = {dtype!r} is not one of {['fp32', *NARROW]}.")
    source = CheckpointSource(find_tag(checkpoint), dtype)
    mine = run_tokenizer(tokenizer, source.state["tokenizer"], source.folder)
    network = _network(source, mine.special, replicas)
    text = network.config.get_text_config()
    mine.require_fit(text.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        mine.write(Path(folder), getattr(text, "max_position_embeddings", None) or _NO_LIMIT)
        return network.eval(), folder_tokenizer(Path(folder))


def _network(source: CheckpointSource, special: SpecialIds, replicas: Replicas) -> Any:
    """A model of transformers as its own class, and with experts as ours around it."""
    target = choose_target(source, "auto")
    with quiet_transformers():
        empty = empty_class(source, target)
    config = empty.config
    read = {name: functools.partial(tensor_of, source, ours) for name, ours in target.names.items()}
    network = _filled(with_bigrams(type(empty), source.base.get("bigram")), config, read, source, replicas)
    stored = source.base.get("generation")
    if stored is not None and network.can_generate():
        network.generation_config = type(network.generation_config).from_dict(with_floats(stored))
    for settings in (network.config, network.config.get_text_config(), network.generation_config):
        for name, number in special.fields().items():
            if settings is not None and getattr(settings, name, None) is None:
                setattr(settings, name, number)
    return network


def _filled(
    cls: Any, config: Any, read: Mapping[str, Callable[[], Tensor]], source: CheckpointSource, replicas: Replicas
) -> Any:
    """A model of a class with the weights that this rank holds.

    Args:
        cls: of transformers.
        config: of it.
        read: what gives each of its tensors, by name.
        source: of the weights.
        replicas: over whose ranks the experts are spread.

    Raises:
        CheckpointError: the tensors are not those of the class.
    """
    experts: dict[str, int] = {}
    for name in read:
        if found := _EXPERT.match(name):
            experts[found[1]] = max(experts.get(found[1], 0), int(found[2]) + 1)

    def here(name: str) -> bool:
        found = _EXPERT.match(name)
        return found is None or int(found[2]) in replicas.share(experts[found[1]])

    weights = {name: give() for name, give in read.items() if here(name)}
    with quiet_transformers():
        try:
            network, told = _spread(cls, replicas).from_pretrained(
                None,
                config=config,
                state_dict=weights,
                dtype=NARROW.get(source.dtype, torch.float32),
                output_loading_info=True,
            )
        except Exception as error:  # transformers raise many types for tensors that do not fit
            raise CheckpointError(f"{source.folder} cannot be loaded as a {cls.__name__}: {one_line(error)}") from error
    lost = {key: [str(value) for value in values][:3] for key, values in told.items() if values}
    if lost:
        raise CheckpointError(f"{source.folder} could not be loaded whole as a {cls.__name__}: {lost}.")
    return network


def _spread(cls: Any, replicas: Replicas) -> Any:
    """The class with those experts alone that this rank of its replica holds."""
    if replicas.size == 1:
        return cls

    def begin(self: Any, config: Any) -> None:
        cls.__init__(self, config)
        for bank in self.modules():
            if type(bank).__name__ == _BANK:
                mine = replicas.share(len(bank.experts))
                kept = [expert if k in mine else _Elsewhere() for k, expert in enumerate(bank.experts)]
                bank.experts = nn.ModuleList(kept)
                bank.register_forward_hook(lambda _bank, _inputs, output: replicas.summed(output))

    return type(cls.__name__, (cls,), {"__init__": begin, "__module__": cls.__module__})


class _Elsewhere(nn.Module):
    """Stands for an expert that another rank holds."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.zeros_like(features)
