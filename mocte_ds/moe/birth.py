"""How a block's experts are born: the gate from the sampled features, the weights and moments from the dense FFN."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mocte_ds.clusters import balanced_kmeans, hash_table, linear_gate, subspace_without_mean, type_table
from mocte_ds.config import MocteConfig, RouterConfig
from mocte_ds.dist.collectives import from_rank_zero, gather_rows
from mocte_ds.moe.bank import Bank
from mocte_ds.moe.block import Block
from mocte_ds.moe.experts import Part, copy_slice
from mocte_ds.moe.keys import TABLES
from mocte_ds.zero.unit_optimizer import UnitState

# Shapes: n tokens and m documents of this rank, d features, k directions.


@dataclass(frozen=True)
class Rows:
    """Features of this rank and the leading directions of all ranks' features."""

    features: Tensor
    """(n, d)."""
    basis: Tensor
    """(d, k) orthonormal."""
    mean: Tensor
    """(d,) of all ranks' features."""


@dataclass(frozen=True)
class FeatureSample:
    """What a gate is made of."""

    tokens: Rows
    """Single tokens."""
    token_ids: Tensor
    """(n,) their ids; -1 where unknown."""
    documents: Rows | None = None
    """Means of documents; None where none was sampled."""


def set_gate(block: Block, config: MocteConfig, sample: FeatureSample) -> None:
    """Fix the routing of a block by the clusters of its sampled features (collective)."""
    for number, bank in enumerate(block.banks):
        _set_bank(bank, bank.gate.router, sample, config.seed + 1000 * number)


def _set_bank(bank: Bank, router: RouterConfig, sample: FeatureSample, seed: int) -> None:
    key, experts = bank.gate.key, bank.num_experts
    if router.kind == "type":
        rows = sample.tokens
        coordinates = gather_rows((rows.features - rows.mean) @ rows.basis)
        ids = gather_rows(sample.token_ids[:, None])[:, 0]
        order = coordinates[:, 0].argsort()  # of its own, whichever rank had which row
        coordinates, ids = coordinates[order], ids[order]
        table = type_table(ids.cpu(), coordinates.cpu(), key.cluster_table.numel(), experts, seed)
        key.set(from_rank_zero(table))
        return
    if router.kind in TABLES:
        key.set(hash_table(key.cluster_table.numel(), experts, seed))
        return
    if router.kind == "random":
        _set_directions(bank, seed)
        return
    # A document's mean feature so far is nearest to a cluster of documents' means.
    rows = sample.documents if router.kind == "prefix" and sample.documents is not None else sample.tokens
    # Without a bias only directions count, and those must not contain the mean's (docs/method.md, section 4).
    basis = rows.basis if router.bias else subspace_without_mean(rows.basis, rows.mean)
    coordinates = gather_rows((rows.features - rows.mean) @ basis)
    coordinates = coordinates[coordinates[:, 0].argsort()]
    clusters = balanced_kmeans(coordinates, experts, seed, directions=not router.bias)
    weight, bias = (from_rank_zero(t.to(basis)) for t in linear_gate(clusters, basis, rows.mean))
    if router.weight == "softmax":
        sharpness = from_rank_zero(_sharpness(gather_rows(rows.features @ weight.T + bias)))
        weight, bias = weight * sharpness, bias * sharpness
    key.set(weight, bias)


def set_random_gate(block: Block, config: MocteConfig) -> None:
    """Route by random directions: for emergence on call before any feature was seen."""
    for number, bank in enumerate(block.banks):
        key = bank.gate.key
        if bank.gate.router.kind in TABLES:
            key.set(hash_table(key.cluster_table.numel(), bank.num_experts, config.seed + 1000 * number))
        else:
            _set_directions(bank, config.seed + 1000 * number)


def _set_directions(bank: Bank, seed: int) -> None:
    """Random directions; for kind `random` as small as Switch starts its router (Fedus et al., 2021).

    Variance 1 for the other kinds: their softmax must be sharp, for a weight under 1 shrinks the block's output.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = bank.gate.key.cluster_weight.shape
    scale = (0.1 / shape[1]) ** 0.5 if bank.gate.router.kind == "random" else 1.0
    bank.gate.key.set(scale * torch.randn(shape, generator=generator), torch.zeros(shape[0]))


def _sharpness(logits: Tensor) -> float:
    """Power of two that, as a factor of the logits (n, E), lifts the mean probability of the chosen expert to .95.

    An expert is born as a copy of the dense FFN, so that any weight below 1 shrinks the block's output.
    """
    factor = 1.0
    while factor < 2.0**20 and float((factor * logits).softmax(-1).amax(-1).mean()) < 0.95:
        factor *= 2.0
    return factor


def copy_dense_weights(block: Block) -> None:
    """`ffn` experts take the dense FFN's weights, each bank its slice, as they are now."""
    for number, bank in enumerate(block.banks):
        for expert in bank.local_experts:
            copy_slice(block.dense, expert, Part(number, len(block.banks)))


def inherit(block: Block, dense_state: UnitState) -> UnitState:
    """fp32 masters and moments for a block's `ffn` experts: those of the dense FFN, each bank its slice."""
    dense = dict(block.dense.named_parameters())
    inherited: UnitState = {}
    for number, bank in enumerate(block.banks):
        part = Part(number, len(block.banks))
        for expert in bank.local_experts:
            for name, parameter in expert.named_parameters():
                state = dense_state.get(dense[name])
                if state is not None:
                    inherited[parameter] = {
                        key: part.cut(block.dense, name, value) if _is_like(value, dense[name]) else value
                        for key, value in state.items()
                    }
    return inherited


def _is_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
