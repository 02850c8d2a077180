"""What a routing key is made of at emergence: clusters of a block's sampled features, or chance."""

from collections.abc import Callable

import torch
from torch import Tensor

from mocte_ds.clusters import (
    balanced_kmeans,
    document_scores,
    even_directions,
    hash_table,
    linear_gate,
    pair_tables,
    random_scores,
    sampled_once,
    shuffled_scores,
    subspace_without_mean,
    type_table,
)
from mocte_ds.clusters.control import random_clusters, shuffled_table
from mocte_ds.config import MocteConfig
from mocte_ds.controller.feature_sample import FeatureSample, Rows
from mocte_ds.dist.collectives import from_rank_zero, sum_over_ranks
from mocte_ds.dist.mesh import Mesh
from mocte_ds.errors import MocteError
from mocte_ds.moe.block import Block
from mocte_ds.remote_code.online_key_mocte import TEMPERATURE
from mocte_ds.router_config import RouterConfig
from mocte_ds.seeds import derived_seed


def gate_seed(seed: int, block: Block, bank: int) -> int:
    """Seed of one bank's random choices: tables, directions, starts of k-means.

    Mixed from the run's seed, the block's path in the model and the bank's number, so that no two of them share a table
    and none depends on which other modules are blocks.
    """
    return derived_seed(seed, block.name, bank)


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
        self._documents_of_tokens = sample.documents_of_tokens if sample else None
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
                shuffled_table(table, sampled, self.groups, derived_seed(self.seed, "shuffled", name), mass)
                for table, sampled, name, mass in zip(
                    tables, (ids, pairs), ("ids", "pairs"), (sampled_once(pairs), None), strict=True
                )
            )
        of_ids, of_pairs = (from_rank_zero(table, self.mesh.world) for table in tables)
        return of_ids, of_pairs

    def scores_of_documents(self, vocab_size: int) -> Tensor:
        """(V, E) how much each token id speaks for each cluster of documents (collective)."""
        assert self.tokens is not None and self._token_ids is not None and self._documents_of_tokens is not None
        coordinates = self.tokens.coordinates(self.mesh.data).cpu()
        both = torch.stack([self._token_ids, self._documents_of_tokens], dim=1)
        ids, documents = self.tokens.gathered(both, self.mesh.data).cpu().unbind(1)
        scores = document_scores(ids, documents, coordinates, vocab_size, self.groups, self.seed)
        if self.router.shuffled:
            scores = shuffled_scores(scores, ids, documents, derived_seed(self.seed, "shuffled"))
        return from_rank_zero(scores, self.mesh.world)

    def random_scores(self, vocab_size: int) -> Tensor:
        """(V, E) normal scores of each token id, at random."""
        return random_scores(vocab_size, self.groups, self.seed)

    def whitened_clusters(self, directions: int, dropped: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clusters by direction of the whitened features without the leading directions (collective).

        Without a sample the map and the centroids are random.

        Args:
            directions: r.
            dropped: leading directions that are left out.

        Returns:
            (r, d) whitening map W and (r,) offset W mu; (E, r) centroids of length one, and (E,) numbers beside
            cos / .1 under which the loads of the sample are even.

        Raises:
            MocteError: features are not finite; on all ranks.
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
        if not bool(torch.isfinite(moments).all()):
            raise MocteError("features to cluster are NaN or infinite; they have overflowed.")
        whitening = self.tokens.mean  # of other ranks than the first only the device counts
        if world.rank == 0:
            whitening = _whitening(moments / max(count - 1, 1.0), directions, dropped).to(whitening)
        whitening = from_rank_zero(whitening, world)
        offset = whitening @ self.tokens.mean.to(whitening)
        points = torch.nn.functional.normalize(self.tokens.features.float() @ whitening.T - offset, dim=1)
        points = self.tokens.gathered(points, data)
        make = random_clusters if self.router.shuffled else balanced_kmeans
        centroids, bias = even_directions(make(points, self.num_experts, self.seed, directions=True), points)
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


def _whitening(covariance: Tensor, directions: int, dropped: int) -> Tensor:
    """(r, d) fp32 map of the features (d, d) fp64 to coordinates of variance one, without the leading directions."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = slice(len(values) - dropped - directions, len(values) - dropped)
    # A direction in which the sample does not differ says nothing.
    inverse = torch.where(values[kept] > 1e-9 * values[-1], values[kept].clamp(min=1e-300).rsqrt(), 0.0)
    return (vectors[:, kept] * inverse).T.float()


def _sharpness(logits: Tensor) -> float:
    """Power of two that, as a factor of the logits (n, E), lifts the mean probability of the chosen expert to .95.

    An expert is born as a copy of the dense FFN, so that any weight below 1 shrinks the block's output.
    """
    factor = 1.0
    while factor < 2.0**20 and float((factor * logits).softmax(-1).amax(-1).mean()) < 0.95:
        factor *= 2.0
    return factor
