"""c-BTM at test time: experts' probabilities of the next token, weighed by the context's nearness to their clusters."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mocte_ds.btm.partition import read_space
from mocte_ds.data import Manifest, validation_batches
from mocte_ds.errors import ConfigError
from mocte_ds.evaluation.live import load_live
from mocte_ds.evaluation.replicas import Replicas
from mocte_ds.training.model import NO_LIMIT, logits_of

_BATCH = 16
"""Sequences of a forward pass."""

# Shapes: E experts, n sequences of T tokens.


@dataclass(frozen=True)
class Mixed:
    """Losses of one way to weigh the experts."""

    temperature: float
    top_k: int
    losses: dict[str, float]
    """Mean loss in nats per token of each domain, and "mean": of the domains."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def mixture_losses(
    clustered: str | Path,
    checkpoints: Sequence[str | Path],
    sequences: int,
    temperatures: Sequence[float],
    top_ks: Sequence[int],
) -> tuple[list[dict[str, float]], list[Mixed], int]:
    """Losses on the validation sequences of a run, of every expert alone and of their mixtures.

    Args:
        clustered: folder of :func:`mocte_ds.btm.partition.partition`.
        checkpoints: of the dense models, in the order of the clusters.
        sequences: at most so many of each domain.
        temperatures: of the softmax over distances.
        top_ks: experts of a token.

    Returns:
        Losses of each expert; of each temperature and number of experts; and the parameters of all experts together.

    Raises:
        ConfigError: another number of models than clusters, or of experts of a token than there are, models of other
            contexts or vocabularies, or a temperature that is not greater than 0.
        CheckpointError: a checkpoint or the clusters are missing or damaged.
        DataError: the data is.
    """
    space, manifest = read_space(clustered), Manifest.read(clustered)
    count = len(space.centres)
    if len(checkpoints) != count:
        raise ConfigError(
            f"{clustered} has {count} clusters, and {len(checkpoints)} models were named; name one of each."
        )
    if wrong := [k for k in top_ks if not 1 <= k <= count]:
        raise ConfigError(f"top-k = {wrong[0]} must lie between 1 and the {count} experts.")
    if wrong_one := [t for t in temperatures if not t > 0]:
        raise ConfigError(f"temperature = {wrong_one[0]} must be greater than 0.")
    told: list[dict[str, Tensor]] = []
    batches: dict[str, tuple[Tensor, Tensor]] = {}
    context, parameters = 0, 0
    for checkpoint in checkpoints:
        network, _ = load_live(Path(checkpoint), None, Replicas(0, 1, 0, 1))
        text = network.config.get_text_config()
        mine = getattr(text, "max_position_embeddings", None) or NO_LIMIT
        if mine == NO_LIMIT or text.vocab_size < manifest.vocab_size or context not in (0, mine):
            raise ConfigError(
                f"{checkpoint} has another longest context or vocabulary than the data or the other models."
            )
        if not batches:
            context, batches = mine, validation_batches(clustered, mine, sequences)
        told.append({domain: _log_likelihoods(network, *given) for domain, given in batches.items()})
        parameters += sum(parameter.numel() for parameter in network.parameters())
    alone = [_with_mean({domain: -float(rows.mean()) for domain, rows in expert.items()}) for expert in told]
    near = {
        domain: np.stack([space.contexts(row, manifest.eod_id) for row in ids.numpy()])
        for domain, (ids, _) in batches.items()
    }
    mixtures = []
    for temperature, top_k in ((t, k) for t in temperatures for k in top_ks):
        losses = {}
        for domain, contexts in near.items():
            shares = space.weights(contexts.reshape(-1, contexts.shape[-1]), temperature, top_k)
            rows = torch.stack([expert[domain] for expert in told]).flatten(1).T  # (n T, E)
            mixed = (rows + torch.from_numpy(shares).log()).logsumexp(dim=1)
            losses[domain] = -float(mixed.mean())
        mixtures.append(Mixed(temperature, top_k, _with_mean(losses)))
    return alone, mixtures, parameters


@torch.no_grad()
def _log_likelihoods(network: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """(n, T) fp64 logarithm of the probability of each next token."""

    def rows() -> Iterator[Tensor]:
        for some, next_ones in zip(ids.split(_BATCH), labels.split(_BATCH), strict=True):
            logits = logits_of(network(input_ids=some, use_cache=False)).double()
            yield logits.log_softmax(dim=-1).gather(-1, next_ones[..., None])[..., 0]

    return torch.cat(list(rows()))


def _with_mean(losses: dict[str, float]) -> dict[str, float]:
    return {**losses, "mean": sum(losses.values()) / len(losses)}
