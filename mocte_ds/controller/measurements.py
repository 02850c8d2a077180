"""What a check measures for every block: the spectrum of its features, and the documents in which it seeks clusters."""

import time
from dataclasses import fields

import torch
from torch import Tensor

from mocte_ds.controller.feature_sample import Rows
from mocte_ds.controller.handles import BlockHandle
from mocte_ds.controller.reading import BlockReading
from mocte_ds.controller.run_state import RunState
from mocte_ds.controller.search import ClusterSearch, Documents
from mocte_ds.dist.collectives import gather_rows, sum_over_ranks
from mocte_ds.dist.mesh import Axis
from mocte_ds.moe.block import BlockMode
from mocte_ds.spectrum.subspace import Subspace, certified_rank, gate_rank, sampled_svd, split_half_angles


def read_blocks(
    run: RunState, handles: list[BlockHandle], in_background: bool, read: list[BlockHandle] | None = None
) -> tuple[dict[int, BlockReading], ClusterSearch | None]:
    """Spectrum of the features that the forward passes left in the reservoirs, and a search for clusters (collective).

    Side effect: the handles remember the bases, which the next check is aligned to.

    Args:
        run: the run.
        handles: blocks that get a reading.
        in_background: look for clusters in a thread.
        read: those of them whose features are read; None: all. The others' readings hold the loads by source alone.

    Returns:
        Readings by block index, and the search whose results :func:`finish_readings` adds; None where there was nothing
        to search in.
    """
    read = handles if read is None else read
    found = _read_spectra(run, read) if read else {}
    search = _start_search(run, read, found, in_background) if read else None
    readings = {h.index: found.get(h.index) or BlockReading.unread(h.block.hidden_size) for h in handles}
    emerged = [handle for handle in handles if handle.mode is not BlockMode.WARMUP]
    for handle, load in zip(emerged, _domain_loads(run, emerged), strict=True):
        readings[handle.index].domain_load = load
        readings[handle.index].drop_rows()  # no gate will be made of them
    return readings, search


def finish_readings(run: RunState, readings: dict[int, BlockReading], search: ClusterSearch | None) -> None:
    """Add what the search found (collective); the handles remember the clusters for the next check."""
    for index, found in (search.results() if search else {}).items():
        reading, handle = readings[index], run.blocks[index]
        reading.found = found
        assert reading.documents is not None
        handle.document_mean, handle.document_basis = reading.documents.mean, reading.documents.basis
        handle.document_centroids, handle.document_prices = found.clusters.centroids, found.clusters.prices
        handle.document_points, handle.document_labels = reading.coordinates, found.detection.labels


def _read_spectra(run: RunState, handles: list[BlockHandle]) -> dict[int, BlockReading]:
    config, started, rank = run.config.spectrum, time.perf_counter(), _rank(run)
    names = [handle.name for handle in handles]
    for doubled in range(config.doublings + 1):
        choice = run.samples.stream.choose_tokens(doubled)
        samples = [run.samples.collectors[handle.index].tokens(choice) for handle in handles]
        total_rows = len(choice.order)
        readings = {h.index: BlockReading(s, total_rows, choice.order) for h, s in zip(handles, samples, strict=True)}
        if total_rows < 2:
            return readings
        features = [sample.features for sample in samples]
        angles = _half_sample_angles(features, rank, names, choice.place, run.mesh.data)
        # Only a block in warm-up needs its directions: a gate is made of them once.
        poor = [
            handle.mode is BlockMode.WARMUP and certified_rank(found, config.max_angle) < config.min_rank
            for handle, found in zip(handles, angles, strict=True)
        ]
        if not any(poor) or total_rows < config.rows << doubled:
            break
    subspaces = _subspaces(features, rank, [handle.token_basis for handle in handles], names, run.mesh.data)
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
    return readings


def _rank(run: RunState) -> int:
    """Directions of every block, whichever of them are read together."""
    return min(run.config.spectrum.rank, *[handle.block.hidden_size for handle in run.blocks])


def _subspaces(
    features: list[Tensor], rank: int, bases: list[Tensor | None], names: list[str], axis: Axis
) -> list[Subspace]:
    """Subspace of each block's rows; one batched call where all widths agree and all blocks have a last basis."""
    if len({x.shape[1] for x in features}) > 1:
        each_block = zip(features, bases, names, strict=True)
        return [sampled_svd(x, rank, axis, basis, names=[name]) for x, basis, name in each_block]
    # A basis out of a checkpoint is on the CPU.
    last = [basis.to(features[0].device) for basis in bases if basis is not None]
    known = torch.stack(last) if len(last) == len(features) else None
    found = sampled_svd(torch.stack(features), rank, axis, known, names=names)
    tensors = {f.name: getattr(found, f.name) for f in fields(found) if f.name not in ("moved_bytes", "rows")}
    each = found.moved_bytes // len(features)
    return [
        Subspace(**{name: value[i] for name, value in tensors.items()}, rows=found.rows, moved_bytes=each)
        for i in range(len(features))
    ]


def _half_sample_angles(
    features: list[Tensor], rank: int, names: list[str], place: Tensor, axis: Axis
) -> list[list[float]]:
    """For each block, the sines of the angles between the leading directions of two half-samples.

    The halves are taken by the rows' hashes: ranks and micro-batches are not to change what a gate is made of.
    """
    if len({x.shape[1] for x in features}) > 1:
        each_block = zip(features, names, strict=True)
        return [split_half_angles(x, rank, axis, names=[name], place=place).tolist() for x, name in each_block]
    return split_half_angles(features, rank, axis, names=names, place=place).tolist()


def _start_search(
    run: RunState, handles: list[BlockHandle], readings: dict[int, BlockReading], in_background: bool
) -> ClusterSearch | None:
    """Bring the documents of all ranks together in few coordinates, and look for clusters in them.

    Rows are put in the order of their hashes, so that nothing depends on which rank had which row.
    """
    config, data, started = run.config, run.mesh.data, time.perf_counter()
    choice = run.samples.stream.choose_documents()
    samples = [run.samples.collectors[handle.index].documents(choice) for handle in handles]
    if len(choice.order) < max(16, 2 * config.num_experts) or not readings[handles[0].index].rows:
        return None
    domains = gather_rows(samples[0][1][:, None], data)[choice.order, 0].cpu()
    means = [sample[0] for sample in samples]
    names = [f"documents of {handle.name}" for handle in handles]
    bases = [handle.document_basis for handle in handles]
    subspaces = _subspaces(means, _rank(run), bases, names, data)
    work = {}
    for handle, rows, space in zip(handles, means, subspaces, strict=True):
        reading = readings[handle.index]
        reading.documents = Rows(rows, space.basis, space.mean, choice.order)
        reading.coordinates, reading.domains = reading.documents.coordinates(data).cpu(), domains
        if space.directions.shape[1] > 1:
            reading.plane = reading.coordinates @ (space.basis.T @ space.directions[:, :2]).cpu()
        tokens = Rows(reading.tokens.features, reading.basis, reading.mean, reading.order).coordinates(data).cpu()
        mean, basis = space.mean.cpu(), space.basis.cpu()
        work[handle.index] = Documents(reading.coordinates, mean, basis, domains, tokens, handle.last_detection)
        reading.bytes["clusters"] = 4 * (reading.coordinates.numel() + tokens.numel())
    search = ClusterSearch(config, work, in_background, run.mesh.world)
    for handle in handles:
        readings[handle.index].seconds["clusters"] = (time.perf_counter() - started) / len(handles)
    return search


def _domain_loads(run: RunState, handles: list[BlockHandle]) -> list[list[list[int]]]:
    """Tokens by source and expert since the sample began, all ranks together, of each block (one exchange)."""
    sources, parts = max(1, len(run.domain_names)), []
    for handle in handles:
        for bank in handle.block.banks:
            table, shape = run.samples.by_source.get(bank.deepspeed_moe), (sources, bank.num_experts)
            fits = table is not None and table.shape == shape
            parts.append(table.cpu() if table is not None and fits else torch.zeros(shape, dtype=torch.int64))
    if not parts:
        return []
    tables = sum_over_ranks(torch.cat(parts, dim=1), run.mesh.data)
    return [table.tolist() for table in tables.split([handle.block.num_experts for handle in handles], dim=1)]
