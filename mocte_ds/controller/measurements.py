"""What a check measures: the spectrum and clusters of every block's features, the trainability of every expert."""

import time
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mocte_ds.clusters import (
    BalancedClusters,
    Detection,
    agreement,
    balanced_kmeans,
    detect,
    published_line,
    stability,
)
from mocte_ds.controller.handles import BlockHandle, ExpertHandle
from mocte_ds.controller.progress import ProgressFacts
from mocte_ds.dist.collectives import gather_objects, gather_rows, sum_over_ranks, world
from mocte_ds.moe.birth import FeatureSample, Rows
from mocte_ds.moe.block import Block, BlockMode, ExpertMode
from mocte_ds.spectrum.subspace import Subspace, certified_rank, gate_rank, sampled_svd, split_half_angles
from mocte_ds.trainability import Probe, top_eigenpair
from mocte_ds.zero import expert_unit

if TYPE_CHECKING:
    from mocte_ds.controller.controller import Controller

PROJECTED_DOCUMENTS = 400
MIN_EXPERT_ROWS = 16


@dataclass
class BlockReading:
    """What one check read of one block; the same on all ranks but for ``tokens``."""

    tokens: tuple[Tensor, Tensor, Tensor]
    """This rank's sampled features (n, d), token ids and sources."""
    rows: int
    """Sampled token features of all ranks; 0: nothing was seen, and everything below is empty."""
    mean: Tensor | None = None
    basis: Tensor | None = None
    """(d, k) the leading centred singular directions that a gate is built in."""
    singular_values: list[float] = field(default_factory=list)
    explained: list[float] = field(default_factory=list)
    certificate: float | None = None
    """Sine of the angle between the subspaces of two half-samples, all directions."""
    certified: int | None = None
    """Leading directions that the sample determines."""
    coordinates: Tensor | None = None
    """(m, r) document means of all ranks in the span of their centred singular directions."""
    plane: Tensor | None = None
    """(m, 2) the same documents in their first two singular directions."""
    domains: Tensor | None = None
    """(m,) sources of those documents, -1 where unknown."""
    detection: Detection | None = None
    labels: Tensor | None = None
    """(m,) balanced clusters of the documents."""
    published: dict[str, float] | None = None
    """What the published rule says of the tokens of the sample."""
    stability: float | None = None
    agreement: dict[str, float] | None = None
    documents: Rows | None = None
    """This rank's document means, with mean and directions of all ranks'."""
    domain_load: list[list[int]] | None = None
    """Tokens by source (rows) and expert (columns, bank after bank) while features were sampled."""
    seconds: dict[str, float] = field(default_factory=lambda: {"spectrum": 0.0, "clusters": 0.0})
    bytes: dict[str, int] = field(default_factory=lambda: {"spectrum": 0, "clusters": 0})

    def sample(self) -> FeatureSample:
        """What a gate is made of."""
        features, ids, _ = self.tokens
        return FeatureSample(Rows(features, self.basis, self.mean), ids, self.documents)

    def facts(self, names: list[str]) -> dict[str, Any]:
        """The numbers of the check's event; ``names`` are the sources."""
        found = self.detection
        load, by_domain = None, None
        if self.domain_load is not None:
            table = torch.tensor(self.domain_load, dtype=torch.float64)
            load = table.sum(0).long().tolist()
            shares = table / table.sum(1, keepdim=True).clamp(min=1)
            by_domain = {name: shares[i].tolist() for i, name in enumerate(names) if table[i].sum() > 0}
        return {
            "rows": self.rows,
            "rank": len(self.singular_values),
            "singular_values": self.singular_values,
            "explained": self.explained,
            "certificate": self.certificate,
            "certified_rank": self.certified,
            "gate_rank": None if self.basis is None else self.basis.shape[1],
            "documents": 0 if self.coordinates is None else self.coordinates.shape[0],
            "clusters": found.count if found else None,
            "sizes": torch.bincount(found.labels[found.labels >= 0]).tolist() if found else None,
            "noise": found.noise if found else None,
            "largest": found.largest if found else None,
            "silhouette": found.silhouette if found else None,
            "eps": found.eps if found else None,
            "eps_sensitivity": [list(pair) for pair in found.sensitivity] if found else None,
            "token_line": self.published,
            "found": bool(found and found.found),
            "reason": found.reason if found else "no document was sampled",
            "stability": self.stability,
            "nmi": self.agreement["nmi"] if self.agreement else None,
            "purity": self.agreement["purity"] if self.agreement else None,
            "load": load,
            "domain_load": by_domain,
        }

    def projection(self, names: list[str]) -> dict[str, Any]:
        """Document means in their first two singular directions, at most a few hundred."""
        if self.plane is None:
            return {"points": [], "cluster": [], "domain": []}
        some = slice(0, PROJECTED_DOCUMENTS)
        domains = self.domains[some].tolist()
        return {
            "points": [[round(x, 4), round(y, 4)] for x, y in self.plane[some].tolist()],
            "cluster": self.labels[some].tolist(),
            "domain": [names[i] if 0 <= i < len(names) else "unknown" for i in domains],
        }


def read_blocks(controller: "Controller", handles: list[BlockHandle]) -> dict[int, BlockReading]:
    """Spectrum and clusters of the features that the forward passes left in the reservoirs (collective).

    Side effect: the handles remember bases and centroids, which the next check is aligned to and compared with.

    Returns:
        Readings by block index.
    """
    config, started = controller.config.spectrum, time.perf_counter()
    for doubled in range(config.doublings + 1):
        samples = [controller.collectors[handle.index].tokens(doubled) for handle in handles]
        total_rows = int(sum_over_ranks(torch.tensor(samples[0][0].shape[0])))
        readings = {h.index: BlockReading(s, total_rows) for h, s in zip(handles, samples, strict=True)}
        if total_rows < 2:
            return readings
        features = [sample[0] for sample in samples]
        angles = _half_sample_angles(features, config.rank)
        # Only a block in warm-up needs its directions: a gate is made of them once.
        poor = [
            handle.mode is BlockMode.WARMUP and certified_rank(found, config.max_angle) < config.min_rank
            for handle, found in zip(handles, angles, strict=True)
        ]
        if not any(poor) or total_rows < config.rows << doubled:
            break
    subspaces = _subspaces(features, config.rank, [handle.token_basis for handle in handles])
    for number, handle in enumerate(handles):
        reading, found = readings[handle.index], subspaces[number]
        reading.mean = found.mean
        reading.certified = certified_rank(angles[number], config.max_angle)
        reading.basis = found.directions[:, : gate_rank(angles[number], config.max_angle)]
        reading.singular_values = found.singular_values.tolist()
        reading.explained = found.explained.tolist()
        reading.certificate = angles[number][-1]
        reading.seconds["spectrum"] = (time.perf_counter() - started) / len(handles)
        reading.bytes["spectrum"] = found.moved_bytes
        if handle.token_basis is None or reading.certificate <= config.max_angle:
            handle.token_basis = found.basis
        if handle.mode is not BlockMode.WARMUP:
            reading.domain_load = _domain_load(controller, handle)
    _read_documents(controller, handles, readings)
    return readings


def _subspaces(features: list[Tensor], rank: int, bases: list[Tensor | None]) -> list[Subspace]:
    """Subspace of each block's rows; one batched call where all widths agree and all blocks have a last basis."""
    widths = {x.shape[1] for x in features}
    rank = min(rank, min(widths))
    if len(widths) > 1:
        return [sampled_svd(x, rank, basis=basis) for x, basis in zip(features, bases, strict=True)]
    known = torch.stack(bases) if all(basis is not None for basis in bases) else None
    found = sampled_svd(torch.stack(features), rank, basis=known)
    tensors = {f.name: getattr(found, f.name) for f in fields(found) if f.name not in ("moved_bytes", "rows")}
    each = found.moved_bytes // len(features)
    return [
        Subspace(**{name: value[i] for name, value in tensors.items()}, rows=found.rows, moved_bytes=each)
        for i in range(len(features))
    ]


def _half_sample_angles(features: list[Tensor], rank: int) -> list[list[float]]:
    """For each block the sines of the angles between two half-samples' leading directions."""
    widths = {x.shape[1] for x in features}
    rank = min(rank, min(widths))
    if len(widths) > 1:
        return [split_half_angles(x, rank).tolist() for x in features]
    return split_half_angles(features, rank).tolist()


def _read_documents(controller: "Controller", handles: list[BlockHandle], readings: dict[int, BlockReading]) -> None:
    """Clusters of the document means; block i is worked on by rank i mod world."""
    config, started = controller.config, time.perf_counter()
    samples = [controller.collectors[handle.index].documents() for handle in handles]
    count = int(sum_over_ranks(torch.tensor(samples[0][0].shape[0])))
    if count < max(16, 2 * config.num_experts):
        return
    domains = gather_rows(samples[0][1][:, None])[:, 0].cpu()
    means = [sample[0] for sample in samples]
    subspaces = _subspaces(means, config.spectrum.rank, [handle.document_basis for handle in handles])
    coordinates = [gather_rows((x - s.mean) @ s.basis).cpu() for x, s in zip(means, subspaces, strict=True)]
    tokens = [_token_coordinates(readings[handle.index]) for handle in handles]
    mine = {}
    rank, size = world()
    for number, handle in enumerate(handles):
        if handle.index % size == rank:
            found = _cluster(controller, handle, coordinates[number], subspaces[number], domains)
            mine[handle.index] = (*found, published_line(tokens[number]))
    results: dict[int, tuple] = {}
    for part in gather_objects(mine):
        results.update(part)
    for number, handle in enumerate(handles):
        reading = readings[handle.index]
        detection, clusters, stable, agree, reading.published = results[handle.index]
        space = subspaces[number]
        reading.coordinates, reading.domains = coordinates[number], domains
        reading.documents = Rows(means[number], space.directions, space.mean)
        if space.directions.shape[1] > 1:
            reading.plane = coordinates[number] @ (space.basis.T @ space.directions[:, :2]).cpu()
        reading.detection, reading.labels = detection, clusters.labels
        reading.stability, reading.agreement = stable, agree
        handle.document_mean, handle.document_basis = space.mean, space.basis
        handle.document_centroids, handle.document_prices = clusters.centroids, clusters.prices
        reading.seconds["clusters"] = (time.perf_counter() - started) / len(handles)
        reading.bytes["clusters"] = 4 * coordinates[number].numel()


def _token_coordinates(reading: BlockReading) -> Tensor:
    """(n, r) coordinates of the sampled tokens of all ranks (collective)."""
    return gather_rows((reading.tokens[0] - reading.mean) @ reading.basis).cpu()


def _cluster(
    controller: "Controller",
    handle: BlockHandle,
    coordinates: Tensor,
    subspace: Subspace,
    domains: Tensor,
) -> tuple[Detection, BalancedClusters, float | None, dict[str, float] | None]:
    """Detect clusters, and compare today's balanced clusters with those of the last check on today's documents.

    Both clusterings label the same documents, with today's features; so no second forward over a probe set is needed.
    """
    config = controller.config
    found = detect(coordinates, config.clusters.min_silhouette, method=config.clusters.method)
    clusters = balanced_kmeans(coordinates, config.num_experts, config.seed)
    stable = None
    if handle.document_centroids is not None:
        mean, basis = subspace.mean.cpu(), subspace.basis.cpu()
        # Today's documents as the last check would have seen them: its mean, its basis, its boundaries.
        features = coordinates @ basis.T + mean - handle.document_mean.cpu()
        last = BalancedClusters(handle.document_centroids, handle.document_prices, clusters.labels, False)
        stable = stability(last.assign(features @ handle.document_basis.cpu()), clusters.labels)
    known = domains >= 0
    agree = agreement(clusters.labels[known], domains[known]) if bool(known.any()) else None
    return found, clusters, stable, agree


def _domain_load(controller: "Controller", handle: BlockHandle) -> list[list[int]]:
    """Tokens by source and expert since the sample was begun, all ranks together."""
    sources = max(1, len(controller.domain_names))
    parts = []
    for bank in handle.block.banks:
        table, shape = bank.deepspeed_moe.by_source, (sources, bank.num_experts)
        parts.append(table if table is not None and table.shape == shape else torch.zeros(shape, dtype=torch.int64))
    return sum_over_ranks(torch.cat(parts, dim=1)).tolist()


def measure_trainability(controller: "Controller", found: ProgressFacts) -> None:
    """Add a probe to the history of every expert that got enough tokens since the last check (collective)."""
    config, measured = controller.config.freeze, {}
    if config.policy != "off":
        squares = controller.optimizer.unit_square_norms
        for handle in controller.blocks:
            for number, bank in enumerate(handle.block.banks):
                layer = bank.deepspeed_moe
                for local, expert in enumerate(bank.local_experts):
                    k = number * bank.num_experts + bank.first_local(controller.ep_rank) + local
                    rows = layer.rows[local]
                    if not _watched(handle.experts[k], config.policy) or rows is None or len(rows) < MIN_EXPERT_ROWS:
                        continue
                    value, _ = top_eigenpair(expert, rows.float(), iterations=config.iterations)
                    norm = squares.get(expert_unit(handle.block, k), 0.0)
                    measured[handle.index, k] = (value / rows.shape[0], rows.shape[0], norm)
    everywhere = gather_objects(measured)
    for handle in controller.blocks:
        for k, expert in enumerate(handle.experts):
            parts = [part[handle.index, k] for part in everywhere if (handle.index, k) in part]
            if parts:
                own, fair = _progress_of(found.progress.get(handle.index), handle.block, k)
                probe = Probe(
                    step=controller.step,
                    share=controller.share,
                    value=sum(part[0] for part in parts) / len(parts),
                    tokens=sum(part[1] for part in parts),
                    gradient_norm=sum(part[2] for part in parts) ** 0.5,
                    progress=own,
                    fair=fair,
                )
                expert.history.append(probe)


def _progress_of(progress: list[float] | None, block: Block, k: int) -> tuple[float | None, float | None]:
    """Progress of an expert, and the mean of its bank."""
    if progress is None:
        return None, None
    size = block.banks[0].num_experts
    bank = progress[k // size * size : (k // size + 1) * size]
    return progress[k], sum(bank) / size


def _watched(expert: ExpertHandle, policy: str) -> bool:
    """Whether a policy reads this expert: while it trains, and frozen as long as it may be thawed."""
    may_thaw = policy == "trainability" and expert.mode is ExpertMode.FROZEN and not expert.thawed
    return expert.mode is ExpertMode.TRAINING or may_thaw
