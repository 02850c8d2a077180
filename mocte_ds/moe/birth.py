"""How a block's experts are born: the gate from the sampled features, the weights and moments from the dense FFN."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mocte_ds.clusters import balanced_kmeans, hash_table, linear_gate, subspace_without_mean, type_table
from mocte_ds.config import MocteConfig, RouterConfig
from mocte_ds.dist.collectives import from_rank_zero, gather_rows
from mocte_ds.moe.bank import Bank
from mocte_ds.moe.block import Block
from mocte_ds.moe.experts import Part, copy_slice, draw_bypass
from mocte_ds.moe.keys import TABLES
from mocte_ds.seeds import derived_seed
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
    order: Tensor | None = None
    """(rows of all ranks,) puts gathered rows into the order of their hashes; None: as the ranks hand them over."""

    def coordinates(self, basis: Tensor | None = None) -> Tensor:
        """(rows of all ranks, k) coordinates in ``basis``, or in the own one (collective)."""
        return self.gathered((self.features - self.mean) @ (self.basis if basis is None else basis))

    def gathered(self, rows: Tensor) -> Tensor:
        """Something of each row, of all ranks (collective)."""
        everywhere = gather_rows(rows)
        return everywhere if self.order is None else everywhere[self.order.to(everywhere.device)]


@dataclass(frozen=True)
class FeatureSample:
    """What a gate is made of."""

    tokens: Rows
    """Single tokens."""
    token_ids: Tensor
    """(n,) their ids; -1 where unknown."""
    documents: Rows | None = None
    """Means of documents; None where none was sampled."""


def gate_seed(seed: int, block: Block, bank: int) -> int:
    """Seed of what chance decides in one bank's routing: tables, directions, starts of k-means.

    Mixed from the run's seed, the block's path in the model and the bank's number, so that no two of them share a table
    and none hangs on which other modules are blocks.
    """
    return derived_seed(seed, block.name, bank)


def bypass_seed(seed: int, block: str, bank: int, expert: int) -> int:
    """Seed of the random matrices of a `lora` expert.

    Args:
        seed: of the run.
        block: the block's path in the model.
        bank: number of the bank.
        expert: number in the bank, whichever rank holds it.
    """
    return derived_seed(seed, block, bank, "expert", expert)


def set_gate(block: Block, config: MocteConfig, sample: FeatureSample) -> None:
    """Fix the routing of a block by the clusters of its sampled features (collective)."""
    for number, bank in enumerate(block.banks):
        _set_bank(bank, bank.gate.router, sample, gate_seed(config.seed, block, number))


def _set_bank(bank: Bank, router: RouterConfig, sample: FeatureSample, seed: int) -> None:
    key, experts = bank.gate.key, bank.num_experts
    if router.kind == "type":
        rows = sample.tokens
        coordinates, ids = rows.coordinates().cpu(), rows.gathered(sample.token_ids[:, None])[:, 0].cpu()
        key.set(from_rank_zero(type_table(ids, coordinates, key.cluster_table.numel(), experts, seed)))
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
    clusters = balanced_kmeans(rows.coordinates(basis), experts, seed, directions=not router.bias)
    weight, bias = (from_rank_zero(t.to(basis)) for t in linear_gate(clusters, basis, rows.mean))
    if router.weight == "softmax":
        sharpness = from_rank_zero(_sharpness(rows.gathered(rows.features @ weight.T + bias)))
        weight, bias = weight * sharpness, bias * sharpness
    key.set(weight, bias)


def set_random_gate(block: Block, config: MocteConfig) -> None:
    """Route by random directions: for emergence on call before any feature was seen."""
    for number, bank in enumerate(block.banks):
        key, seed = bank.gate.key, gate_seed(config.seed, block, number)
        if bank.gate.router.kind in TABLES:
            key.set(hash_table(key.cluster_table.numel(), bank.num_experts, seed))
        else:
            _set_directions(bank, seed)


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


def draw_bypasses(block: Block, config: MocteConfig, ep_rank: int) -> None:
    """Give each `lora` expert random matrices of its own; what it writes stays zero.

    Experts that start alike get the same first gradients wherever they see the same tokens, and a bank of copies spans
    fewer directions than its width. An expert's draw hangs on no number of ranks.

    Args:
        block: of kind `lora`.
        config: the "mocte" block.
        ep_rank: this rank's place among those that share the experts.
    """
    for number, bank in enumerate(block.banks):
        for local, expert in enumerate(bank.local_experts):
            k = bank.first_local(ep_rank) + local
            draw_bypass(expert, bypass_seed(config.seed, block.name, number, k))


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
