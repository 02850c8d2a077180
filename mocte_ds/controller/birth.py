"""How a block's experts are born: the gate from the sampled features, the weights and moments from the dense FFN."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mocte_ds.clusters import (
    balanced_kmeans,
    even_directions,
    hash_table,
    linear_gate,
    pair_tables,
    subspace_without_mean,
    type_table,
)
from mocte_ds.clusters.control import random_clusters, shuffled_table
from mocte_ds.config import MocteConfig, RouterConfig
from mocte_ds.dist.collectives import from_rank_zero, gather_rows, sum_over_ranks
from mocte_ds.dist.mesh import Axis, Mesh
from mocte_ds.moe.bank import Bank
from mocte_ds.moe.block import Block
from mocte_ds.moe.experts import copy_slice, draw_bypass
from mocte_ds.moe.ffn_shape import Part
from mocte_ds.moe.redraw import Drawn, redraw
from mocte_ds.remote_code.online_key_mocte import TEMPERATURE
from mocte_ds.remote_code.tokens_mocte import Tokens
from mocte_ds.seeds import derived_seed
from mocte_ds.zero import whole
from mocte_ds.zero.unit_optimizer import UnitState

_ROWS = 4096
"""Of the weights' mean where nothing was sampled."""

# Shapes: n tokens and m documents of this rank, d features, k directions.


@dataclass(frozen=True)
class Rows:
    """Features of this rank and the leading directions of all ranks' features."""

    features: Tensor
    """(n, d)."""
    basis: Tensor
    """(d, k) orthonormal."""
    mean: Tensor
    """(d,) mean of all ranks' features."""
    order: Tensor | None = None
    """(rows of all ranks,) order of the gathered rows by their hashes; None: they stay in the order of the ranks."""

    def coordinates(self, axis: Axis, basis: Tensor | None = None) -> Tensor:
        """(rows of all ranks, k) coordinates in ``basis``; None: in its own (collective)."""
        return self.gathered((self.features - self.mean) @ (self.basis if basis is None else basis), axis)

    def gathered(self, rows: Tensor, axis: Axis) -> Tensor:
        """Something of each row, of all ranks (collective)."""
        everywhere = gather_rows(rows, axis)
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
    ids_before: Tensor | None = None
    """(n,) ids of the tokens before, in their documents; None: unknown."""


def gate_seed(seed: int, block: Block, bank: int) -> int:
    """Seed of one bank's random choices: tables, directions, starts of k-means.

    Mixed from the run's seed, the block's path in the model and the bank's number, so that no two of them share a table
    and none depends on which other modules are blocks.
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


class Birth:
    """What the routing key of one bank is made of: a sample's clusters, or chance; handed to :meth:`Key.fit`."""

    def __init__(
        self, block: Block, number: int, config: MocteConfig, mesh: Mesh, sample: FeatureSample | None
    ) -> None:
        """Of one bank.

        Args:
            block: the block.
            number: of the bank.
            config: the "mocte" block.
            mesh: of the run's ranks.
            sample: sampled features; None: the block emerges on call, before any feature was seen.
        """
        bank = block.banks[number]
        self.router: RouterConfig = bank.gate.router
        self.num_experts, self.hidden_size = bank.num_experts, block.hidden_size
        self.groups = self.router.groups or bank.num_experts
        """Numbers that tables deal out: groups of experts, one for each expert unless the router says otherwise."""
        self.seed = gate_seed(config.seed, block, number)
        """Seed of the random choices of this bank alone."""
        self.tokens = sample.tokens if sample else None
        """Features of single tokens; None without a sample."""
        self.documents = sample.documents if sample else None
        """Mean features of documents; None where none was sampled."""
        self._token_ids = sample.token_ids if sample else None
        self._ids_before = sample.ids_before if sample else None
        self.mesh = mesh
        """The ranks that have parts of the sample, and make the same key of it."""

    def nearest_cluster(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(E, d) and (E,): the linear map whose largest output is the nearest of E balanced clusters (collective)."""
        # Without a bias only directions count, and those must not contain the mean's (docs/method.md, section 4).
        basis = rows.basis if self.router.bias else subspace_without_mean(rows.basis, rows.mean)
        data, world = self.mesh.data, self.mesh.world
        points = rows.coordinates(data, basis)
        make = random_clusters if self.router.shuffled else balanced_kmeans
        clusters = make(points, self.num_experts, self.seed, directions=not self.router.bias)
        weight, bias = (from_rank_zero(t.to(basis), world) for t in linear_gate(clusters, basis, rows.mean))
        if self.router.weight == "softmax":
            sharpness = from_rank_zero(_sharpness(rows.gathered(rows.features @ weight.T + bias, data)), world)
            weight, bias = weight * sharpness, bias * sharpness
        return weight, bias

    def table_of_clusters(self, vocab_size: int) -> Tensor:
        """(V,) int64 cluster of each token id's mean feature; ids that were not sampled are dealt out (collective)."""
        assert self.tokens is not None and self._token_ids is not None
        coordinates = self.tokens.coordinates(self.mesh.data).cpu()
        ids = self.tokens.gathered(self._token_ids[:, None], self.mesh.data)[:, 0].cpu()
        table = type_table(ids, coordinates, vocab_size, self.groups, self.seed)
        if self.router.shuffled:
            table = shuffled_table(table, ids, self.groups, derived_seed(self.seed, "shuffled"))
        return from_rank_zero(table, self.mesh.world)

    def tables_of_pairs(
        self, row: Callable[[Tensor, Tensor], Tensor], vocab_size: int, rows: int
    ) -> tuple[Tensor, Tensor]:
        """Clusters of the mean features of pairs of tokens, and of single ones (collective).

        Args:
            row: row of each pair, from the ids before and the ids.
            vocab_size: V.
            rows: R.

        Returns:
            (V,) int64 cluster of each token id, and (R,) int64 that of each row, -1 where nothing was sampled.
        """
        assert self.tokens is not None and self._token_ids is not None and self._ids_before is not None
        coordinates = self.tokens.coordinates(self.mesh.data).cpu()
        both = torch.stack([self._ids_before, self._token_ids], dim=1)
        before, ids = self.tokens.gathered(both, self.mesh.data).cpu().unbind(1)
        pairs = row(before, ids)
        tables = pair_tables(ids, pairs, coordinates, vocab_size, rows, self.groups, self.seed)
        if self.router.shuffled:
            tables = tuple(
                shuffled_table(table, sampled, self.groups, derived_seed(self.seed, "shuffled", name))
                for table, sampled, name in zip(tables, (ids, pairs), ("ids", "pairs"), strict=True)
            )
        of_ids, of_pairs = (from_rank_zero(table, self.mesh.world) for table in tables)
        return of_ids, of_pairs

    def whitened_clusters(self, directions: int, dropped: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clusters by direction of the whitened features without the leading directions (collective).

        Without a sample the map and the centroids are random.

        Args:
            directions: r.
            dropped: leading directions that are left out.

        Returns:
            (r, d) whitening map W and (r,) offset W mu; (E, r) centroids of length one, and (E,) numbers beside
            cos / .1 under which the loads of the sample are even.
        """
        generator = torch.Generator().manual_seed(self.seed)
        if self.tokens is None:
            whitening = torch.randn(directions, self.hidden_size, generator=generator)
            centroids = torch.nn.functional.normalize(torch.randn(self.num_experts, directions, generator=generator))
            return whitening, torch.zeros(directions), centroids, torch.zeros(self.num_experts)
        data, world = self.mesh.data, self.mesh.world
        centred = (self.tokens.features.float() - self.tokens.mean).double()
        moments = sum_over_ranks(centred.T @ centred, data).cpu()
        count = float(sum_over_ranks(torch.tensor([len(centred)]), data)[0])
        values, vectors = torch.linalg.eigh(moments / max(count - 1, 1.0))
        kept = slice(len(values) - dropped - directions, len(values) - dropped)
        # A direction in which the sample does not differ says nothing.
        inverse = torch.where(values[kept] > 1e-9 * values[-1], values[kept].clamp(min=1e-300).rsqrt(), 0.0)
        whitening = from_rank_zero((vectors[:, kept] * inverse).T.float().to(self.tokens.mean), world)
        offset = whitening @ self.tokens.mean.to(whitening)
        points = torch.nn.functional.normalize(self.tokens.features.float() @ whitening.T - offset, dim=1)
        make = random_clusters if self.router.shuffled else balanced_kmeans
        centroids, bias = even_directions(
            make(self.tokens.gathered(points, data), self.num_experts, self.seed, directions=True),
            self.tokens.gathered(points, data),
        )
        found = (whitening, offset, centroids.to(whitening), bias.to(whitening) / (2 * TEMPERATURE))
        first, second, third, fourth = (from_rank_zero(part, world) for part in found)
        return first, second, third, fourth

    def random_table(self, vocab_size: int) -> Tensor:
        """(V,) int64 expert of each token id, drawn at random, all experts equally often."""
        return hash_table(vocab_size, self.groups, self.seed)

    def random_integers(self, count: int, low: int, high: int) -> Tensor:
        """(count,) int64 numbers from low to high - 1."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "integers"))
        return torch.randint(low, high, (count,), generator=generator)

    def directions(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """(E, d) normal random directions and (E,) zeros.

        Args:
            scale: standard deviation. 1 makes the softmax sharp, as a weight needs that must not shrink the block's
                output.
        """
        generator = torch.Generator().manual_seed(self.seed)
        weight = scale * torch.randn(self.num_experts, self.hidden_size, generator=generator)
        return weight, torch.zeros(self.num_experts)


def set_gate(block: Block, config: MocteConfig, mesh: Mesh, sample: FeatureSample | None = None) -> None:
    """Fix a block's routing by the clusters of its sampled features, or at random without a sample (collective)."""
    for number, bank in enumerate(block.banks):
        birth = Birth(block, number, config, mesh, sample)
        bank.gate.key.fit(birth)
        if bank.gate.router.unit_mean:
            with whole(bank.gate.parameters()):
                bank.gate.cluster_mean.fill_(_mean_weight(bank, birth, sample))


def _mean_weight(bank: Bank, birth: Birth, sample: FeatureSample | None) -> float:
    """Mean over the sample of the sum of a token's weights at birth (collective).

    Before any feature was seen, over normal rows of the size that a norm before the FFN gives.
    """
    if sample is not None:
        total, count = bank.gate.begin_mean(
            sample.tokens.features, Tokens(sample.token_ids, previous=sample.ids_before)
        )
        own = torch.stack([total.cpu(), torch.tensor(float(count))]).double()
        sums = from_rank_zero(sum_over_ranks(own, birth.mesh.data), birth.mesh.world)
        return float(sums[0] / sums[1])
    generator = torch.Generator().manual_seed(derived_seed(birth.seed, "mean weight"))
    rows = torch.randn(_ROWS, birth.hidden_size, generator=generator)
    total, count = bank.gate.begin_mean(rows, Tokens(torch.zeros(_ROWS, dtype=torch.int64)))
    return float(from_rank_zero(total.cpu(), birth.mesh.world)) / count


def _sharpness(logits: Tensor) -> float:
    """Power of two that, as a factor of the logits (n, E), lifts the mean probability of the chosen expert to .95.

    An expert is born as a copy of the dense FFN, so that any weight below 1 shrinks the block's output.
    """
    factor = 1.0
    while factor < 2.0**20 and float((factor * logits).softmax(-1).amax(-1).mean()) < 0.95:
        factor *= 2.0
    return factor


def copy_dense_weights(block: Block) -> None:
    """Copy the dense FFN's current weights into the `ffn` experts, each bank its slice."""
    for number, bank in enumerate(block.banks):
        for expert in bank.local_experts:
            copy_slice(block.dense, expert, Part(number, len(block.banks)))


@torch.no_grad()
def redraw_units(block: Block, config: MocteConfig, ep_rank: int) -> dict[nn.Parameter, Drawn]:
    """Redraw the share `expert.redraw` of each local expert; the result does not depend on the number of ranks.

    Args:
        block: whose experts have the weights that they are born with.
        config: the "mocte" block.
        ep_rank: this rank's place among those that share the experts.

    Returns:
        What was drawn, for :func:`inherit`.
    """
    drawn: dict[nn.Parameter, Drawn] = {}
    for number, bank in enumerate(block.banks if config.expert.redraw else ()):
        for local, expert in enumerate(bank.local_experts):
            k = bank.first_local(ep_rank) + local
            seed = derived_seed(config.seed, block.name, number, "units of expert", k)
            named = dict(expert.named_parameters())
            for name, new in redraw(expert, block.dense, config.expert.redraw, seed).items():
                named[name].copy_(new.put(named[name]))
                drawn[named[name]] = new
    return drawn


def draw_bypasses(block: Block, config: MocteConfig, ep_rank: int) -> None:
    """Give each `lora` expert random matrices of its own; what it writes stays zero.

    Experts that start alike get the same first gradients wherever they see the same tokens, and a bank of copies spans
    fewer directions than its width. An expert's draw does not depend on the number of ranks.

    Args:
        block: of kind `lora`.
        config: the "mocte" block.
        ep_rank: this rank's place among those that share the experts.
    """
    for number, bank in enumerate(block.banks):
        for local, expert in enumerate(bank.local_experts):
            k = bank.first_local(ep_rank) + local
            draw_bypass(expert, bypass_seed(config.seed, block.name, number, k))


def inherit(block: Block, dense_state: UnitState, drawn: Mapping[nn.Parameter, Drawn] | None = None) -> UnitState:
    """fp32 masters and moments for a block's `ffn` experts: those of the dense FFN, each bank its slice.

    Args:
        block: the block.
        dense_state: of the dense FFN.
        drawn: what is new in the experts: its moments are zero.
    """
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
    for parameter, new in (drawn or {}).items():
        state = inherited.get(parameter, {})
        for key, value in state.items():
            if key == "master":
                state[key] = new.put(value)
            elif _is_like(value, parameter):
                state[key] = new.clear(value)
    return inherited


def _is_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
