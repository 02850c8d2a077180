"""Seconds and bytes of sampling, sampled SVD, certificate and document clustering, and their share of training time."""

import argparse
import sys
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mocte_ds.benchmark.measure.clock import Clock
from mocte_ds.benchmark.measure.features import planted_features
from mocte_ds.benchmark.measure.memory import require_memory
from mocte_ds.benchmark.measure.options import require_at_least
from mocte_ds.benchmark.measure.parts import TimedPart, parts_table
from mocte_ds.benchmark.measure.share import Costs, add_share_arguments, shares, shares_text
from mocte_ds.benchmark.measure.spectrum_work import FORMULAS, SpectrumSizes, peak_bytes, spectrum_work
from mocte_ds.clusters import agreement, balanced_kmeans, detect, published_line, stability
from mocte_ds.controller.collect import FeatureCollector, SampleStream
from mocte_ds.dist.mesh import ALONE
from mocte_ds.moe.forward import ForwardState
from mocte_ds.spectrum import Subspace, sampled_svd, split_half_angles

_STORES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Every block costs the same; so sampling and clustering are timed on a few and multiplied.
_CLUSTERED, _SAMPLED, _MICRO_BATCHES = 4, 4, 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the check; the defaults are those of launch/runs/llama-7b.yaml."""
    parser.add_argument("--d", type=int, default=4096, help="features (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=32, help="blocks (default: %(default)s)")
    parser.add_argument(
        "--rows", type=int, default=8192, help="sampled tokens, all ranks together (default: %(default)s)"
    )
    parser.add_argument(
        "--documents", type=int, default=4096, help="sampled documents, all ranks together (default: %(default)s)"
    )
    parser.add_argument("--rank", type=int, default=8, help="singular directions (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=8, help="clusters of equal size (default: %(default)s)")
    parser.add_argument(
        "--doublings",
        type=int,
        default=2,
        help="doublings of the sample for which rows are kept (default: %(default)s)",
    )
    parser.add_argument("--context", type=int, default=4096, help="tokens per sequence (default: %(default)s)")
    parser.add_argument(
        "--store",
        choices=tuple(_STORES),
        default="fp32",
        help="data type of features in memory (default: %(default)s, as in a run)",
    )
    add_share_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; see the module's first line.

    Raises:
        MocteError: sizes that make no sense or do not fit into memory.
    """
    for name, least in (
        ("d", 1),
        ("layers", 1),
        ("rows", 2),
        ("documents", 16),
        ("rank", 1),
        ("experts", 2),
        ("doublings", 0),
    ):
        require_at_least(args, name, least)
    require_at_least(args, "context", 16)
    require_at_least(args, "d", args.rank)
    require_at_least(args, "documents", args.experts)
    clock = Clock(args.device)
    sizes = SpectrumSizes(
        d=args.d,
        layers=args.layers,
        rows=args.rows,
        documents=args.documents,
        rank=args.rank,
        experts=args.experts,
        context=args.context,
        sequences=1,
        offered=args.context,
        clustered=args.layers,
        doublings=args.doublings,
    )
    memory = require_spectrum_memory(sizes, clock, args.store)
    costs = Costs(
        measure=lambda plan: measure_spectrum(SpectrumSizes.of(plan), clock, 5),
        work=lambda plan: spectrum_work(SpectrumSizes.of(plan)),
        same_sizes=lambda plan: _same(sizes, SpectrumSizes.of(plan)),
    )
    parts = measure_spectrum(sizes, clock, args.repeats, args.store)
    memory["peak_bytes"] = clock.peak_bytes()
    return {
        "benchmark": "spectrum",
        "sizes": {**asdict(sizes), "store": args.store},
        "memory": memory,
        "parts": {name: part.to_dict() for name, part in parts.items()},
        "check_seconds": sum(part.seconds for part in parts.values() if part.every_check),
        "formulas": FORMULAS,
        **shares(args, clock, costs, parts),
    }


def require_spectrum_memory(sizes: SpectrumSizes, clock: Clock, store: str) -> dict[str, int]:
    """Refuse sizes that do not fit; see :func:`mocte_ds.benchmark.measure.memory.require_memory`."""
    what = f"a check of {sizes.layers} layers x {sizes.rows} rows x {sizes.d} features in {store}"
    mend = "Give fewer --layers or --rows" + (", or --store bf16." if store == "fp32" else ".")
    return require_memory(peak_bytes(sizes, _STORES[store].itemsize), clock.device, what, mend)


def measure_spectrum(sizes: SpectrumSizes, clock: Clock, repeats: int = 3, store: str = "fp32") -> dict[str, TimedPart]:
    """Time every part of a check's spectrum and clusters, in one process that holds the sample of all ranks.

    Args:
        sizes: of the check.
        clock: of the device.
        repeats: timed calls of each part; the shortest counts.
        store: how features lie in memory.

    Returns:
        Parts in the order of a check.
    """
    works, found = spectrum_work(sizes), {}
    with tqdm(total=12, desc="spectrum", unit="part", bar_format="{desc} {n}/{total} {elapsed}{postfix}") as bar:

        def part(name: str, what: str, where: str, timed: Any, every_check: bool = True, share: float = 1.0) -> Any:
            bar.set_postfix_str(name.replace("_", " "))
            seconds, result = clock.seconds(timed, repeats)
            found[name] = TimedPart(what, works[name], seconds / share, where, every_check)
            bar.update()
            return result

        tokens, moved = _time_tokens(sizes, _layers(sizes, sizes.rows, clock, store, bar), part)
        for name, number in moved.items():
            # What was really moved: the formula's number, unless a warm start took more than one pass.
            found[name] = replace(found[name], work=replace(works[name], moved_bytes=number))
        documents = _time_documents(sizes, _layers(sizes, sizes.documents, clock, store, bar), part)
        _time_clusters(documents[:_CLUSTERED], tokens[:_CLUSTERED], sizes, part)
        _time_sampling(sizes, clock, part)
    return {name: found[name] for name in works}


def text(numbers: dict[str, Any]) -> str:
    """For people: a table of the parts, then the shares."""
    s = numbers["sizes"]
    lines = [
        f"one check of {s['layers']} blocks: {s['rows']:,} token rows and {s['documents']:,} documents of {s['d']:,} "
        f"features, {s['rank']} directions; sampling: {s['offered']:,} tokens offered by every block",
        parts_table(numbers["parts"]),
        f"a check, without cold starts: {numbers['check_seconds']:.3g} s",
        shares_text(numbers),
    ]
    return "\n\n".join(lines)


def _turned(rows: list[Tensor], space: Subspace) -> list[Tensor]:
    """(n, r) coordinates of every block's rows, on the CPU."""
    return [((x.float() - mean) @ v).cpu() for x, mean, v in zip(rows, space.mean, space.basis, strict=True)]


def _same(one: SpectrumSizes, other: SpectrumSizes) -> bool:
    names = ("d", "layers", "rows", "documents", "rank", "experts")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _layers(sizes: SpectrumSizes, rows: int, clock: Clock, store: str, bar: tqdm) -> list[Tensor]:
    layers = []
    for layer in range(sizes.layers):
        text = f"making features of block {layer + 1} of {sizes.layers}"
        bar.set_postfix_str(text, refresh=layer == 0 or sys.stderr.isatty())
        layers.append(planted_features(rows, sizes.d, sizes.experts, layer, clock.device, _STORES[store])[0])
    return layers


def _time_tokens(sizes: SpectrumSizes, rows: list[Tensor], part: Any) -> tuple[list[Tensor], dict[str, int]]:
    """Token features: the first check's SVD, a later one's, certificate, coordinates (n, r); and the bytes moved."""
    svd = partial(sampled_svd, rows, sizes.rank, ALONE)
    cold = part("svd_cold", "token features, five passes: a block's first check", "device", svd, False)
    warm = part("svd_warm", "token features, one pass", "device", partial(svd, basis=cold.basis))
    halves = partial(split_half_angles, rows, sizes.rank, ALONE)
    part("certificate", "two half-samples, five passes each", "device", halves)
    points = part("token_coordinates", "token features in their directions", "device", partial(_turned, rows, warm))
    return points, {"svd_cold": cold.moved_bytes, "svd_warm": warm.moved_bytes}


def _time_documents(sizes: SpectrumSizes, documents: list[Tensor], part: Any) -> list[Tensor]:
    """Document means: SVD and coordinates. Returns the coordinates (m, r) of every block."""

    def coordinates(basis: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        space = sampled_svd(documents, sizes.rank, ALONE, basis)
        return space.basis, _turned(documents, space)

    basis, _ = part("documents_svd_cold", "document means, five passes", "device", coordinates, False)
    return part("documents_svd", "document means, one pass", "device", partial(coordinates, basis))[1]


def _time_clusters(points: list[Tensor], tokens: list[Tensor], sizes: SpectrumSizes, part: Any) -> None:
    """Detection, balanced k-means, their comparison with the last check and the sources, and the published rule."""
    share = len(points) / sizes.clustered
    where = f"on the CPU, timed on {len(points)} blocks" if share < 1 else "on the CPU"
    part("detect", f"DBSCAN of documents, {where}", "beside", lambda: [detect(z) for z in points], share=share)
    clusters = part(
        "balanced_kmeans",
        f"{sizes.experts} parts of equal size, {where}",
        "beside",
        lambda: [balanced_kmeans(z, sizes.experts, 0) for z in points],
        share=share,
    )
    sources = torch.randint(sizes.experts, (len(points[0]),), generator=torch.Generator().manual_seed(0))

    def compare() -> None:
        for z, found in zip(points, clusters, strict=True):
            stability(found.assign(z), found.labels)
            agreement(found.labels, sources)

    part("agreement", f"with the last check and with the sources, {where}", "beside", compare, share=share)
    line = f"the published rule on tokens, for the log, {where}"
    part("token_line", line, "beside", lambda: [published_line(z) for z in tokens], share=share)


def _time_sampling(sizes: SpectrumSizes, clock: Clock, part: Any) -> None:
    """The forward hook of a few blocks on as many micro-batches as fill their reservoirs; the choice is made once."""
    batch = sizes.sequences * sizes.context
    blocks = min(sizes.layers, _SAMPLED)
    turns = min(_MICRO_BATCHES, max(2, -(-2 * (sizes.rows << sizes.doublings) // batch)))
    features = planted_features(batch, sizes.d, sizes.experts, 0, clock.device, torch.bfloat16)[0]
    features = features.view(sizes.sequences, sizes.context, sizes.d)

    def see() -> None:
        stream = SampleStream(sizes.rows, sizes.documents, 0, None, ALONE, sizes.doublings)
        collectors = [FeatureCollector(sizes.d, stream) for _ in range(blocks)]
        for turn in range(turns):
            state = ForwardState(first_sequence=turn * sizes.sequences)
            for collector in collectors:
                collector.see(features, state)

    share = turns * batch * blocks / (sizes.offered * sizes.layers)
    what = f"in forward passes, timed on {turns} micro-batches of {blocks} blocks"
    part("sampling", what, "device", see, share=share)
