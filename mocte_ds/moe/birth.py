"""How a block's experts are born: the gate from the sampled features, the weights and moments from the dense FFN."""

import torch
from torch import Tensor

from mocte_ds.clusters import balanced_kmeans, hash_table, linear_gate, subspace_without_mean, type_table
from mocte_ds.config import MocteConfig
from mocte_ds.dist.collectives import from_rank_zero, gather_rows
from mocte_ds.moe.block import Block
from mocte_ds.zero.optimizer import UnitState


def set_gate(block: Block, config: MocteConfig, sample: tuple[Tensor, Tensor], basis: Tensor, mean: Tensor) -> None:
    """Fix the routing of a block by the clusters of its sampled token features (collective).

    Args:
        block: in warm-up.
        config: the "mocte" block.
        sample: this rank's token features (n, d) and token ids (n,).
        basis: (d, r) centred singular directions of the features of all ranks.
        mean: (d,) their mean.
    """
    features, token_ids = sample
    for number, bank in enumerate(block.banks):
        seed = config.seed + 1000 * number
        gate, experts = bank.gate, bank.num_experts
        if config.router.kind == "hash":
            gate.set_table(hash_table(gate.cluster_table.numel(), experts, seed))
            continue
        if config.router.kind == "type":
            coords = gather_rows((features - mean) @ basis)
            ids = gather_rows(token_ids[:, None])[:, 0]
            table = from_rank_zero(type_table(ids.cpu(), coords.cpu(), gate.cluster_table.numel(), experts, seed))
            gate.set_table(table)
            continue
        if not config.router.bias:
            # Without a bias only directions count, and those must not contain the mean's (docs/method.md, section 4).
            basis = subspace_without_mean(basis, mean)
        coords = gather_rows((features - mean) @ basis)
        clusters = balanced_kmeans(coords, experts, seed, directions=not config.router.bias)
        weight, bias = (from_rank_zero(t.to(basis)) for t in linear_gate(clusters, basis, mean))
        if config.router.weight == "softmax":
            sharpness = from_rank_zero(_sharpness(gather_rows(features @ weight.T + bias)))
            weight, bias = weight * sharpness, bias * sharpness
        gate.set_linear(weight, bias)


def set_random_gate(block: Block, config: MocteConfig) -> None:
    """Route by random directions: for emergence on call before any feature was seen."""
    for number, bank in enumerate(block.banks):
        generator = torch.Generator().manual_seed(config.seed + 1000 * number + block.hidden_size)
        if config.router.kind == "token":
            directions = torch.randn(bank.num_experts, block.hidden_size, generator=generator)
            bank.gate.set_linear(directions, torch.zeros(bank.num_experts))
        else:
            table = torch.randint(bank.num_experts, bank.gate.cluster_table.shape, generator=generator)
            bank.gate.set_table(table)


def _sharpness(logits: Tensor) -> float:
    """Power of two that, as a factor of the logits (n, E), lifts the mean probability of the chosen expert to .95.

    An expert is born as a copy of the dense FFN, so that any weight below 1 shrinks the block's output.
    """
    factor = 1.0
    while factor < 2.0**20 and float((factor * logits).softmax(-1).amax(-1).mean()) < 0.95:
        factor *= 2.0
    return factor


@torch.no_grad()
def copy_dense_weights(block: Block) -> None:
    """`ffn` experts take the dense FFN's weights as they are now."""
    dense = dict(block.dense.named_parameters())
    for bank in block.banks:
        for expert in bank.local_experts:
            for name, parameter in expert.named_parameters():
                parameter.copy_(dense[name])


def inherit(block: Block, dense_state: UnitState) -> UnitState:
    """fp32 masters and moments for a block's `ffn` experts: those of the dense FFN."""
    dense = dict(block.dense.named_parameters())
    return {
        parameter: dense_state[dense[name]]
        for bank in block.banks
        for expert in bank.local_experts
        for name, parameter in expert.named_parameters()
        if dense[name] in dense_state
    }
