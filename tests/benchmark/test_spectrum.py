"""The benchmark of spectrum and clusters: its formulas against real calls, its numbers against each other."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mocte_ds.benchmark.measure.features import planted_features
from mocte_ds.benchmark.measure.spectrum_work import SpectrumSizes, peak_bytes, spectrum_work, svd_work
from mocte_ds.clusters import detect
from mocte_ds.dist.mesh import ALONE
from mocte_ds.errors import MocteError
from mocte_ds.spectrum import Reservoir, sampled_svd, split_half_certificate
from mocte_ds.spectrum.subspace import COLD_PASSES
from tests.benchmark.conftest import BATCH
from tools.benchmark import main

SIZES = ["--d", 32, "--layers", 3, "--rows", 96, "--documents", 64, "--rank", 4, "--experts", 4, "--context", 32]
PARTS = {
    "sampling": 0,
    "svd_cold": 0,
    "svd_warm": 1,
    "certificate": 1,
    "documents_svd_cold": 0,
    "documents_svd": 1,
    "detect": 1,
    "balanced_kmeans": 1,
    "agreement": 1,
    "token_coordinates": 1,
    "token_line": 1,
}


def documented_bytes(layers: int, d: int, rank: int, passes: int) -> int:
    """The formula that the tool prints, for d of at least q (P + 1)."""
    q = rank + 8
    return layers * (8 * (d + 3) + 4 * d * q * passes + 8 * (q * (passes + 1)) ** 2)


@pytest.mark.parametrize(
    ("layers", "rows", "d", "rank"), [(1, 80, 100, 8), (3, 60, 128, 4), (2, 50, 20, 4), (1, 9, 6, 6)]
)
def test_bytes_of_an_svd_are_those_that_it_moved(layers: int, rows: int, d: int, rank: int) -> None:
    x = torch.stack([planted_features(rows, d, 4, seed, torch.device("cpu"))[0] for seed in range(layers)])
    cold = sampled_svd(x, rank, ALONE)
    warm = sampled_svd(x, rank, ALONE, basis=cold.basis, passes=1)
    for passes, found in ((COLD_PASSES, cold), (1, warm)):
        assert svd_work(layers, rows, d, rank, passes).moved_bytes == found.moved_bytes
        if d >= (rank + 8) * (passes + 1):
            assert documented_bytes(layers, d, rank, passes) == found.moved_bytes


@pytest.mark.parametrize(("ranks", "doublings"), [(1, 0), (2, 2), (64, 1)])
def test_rows_that_a_rank_keeps_are_its_reservoirs(ranks: int, doublings: int) -> None:
    sizes = replace(_sizes(d=8, layers=1, rows=8192, rank=2), doublings=doublings, ranks=ranks)
    assert sizes.kept(8192 << doublings) == Reservoir(8192 << doublings, 10, 0, ranks=ranks).selection.room


@pytest.mark.parametrize("passes", [1, COLD_PASSES])
def test_flops_of_an_svd(passes: int) -> None:
    """With many rows and few features, what the formula leaves out (orthonormal columns) is small."""
    x = torch.randn(2, 30_000, 96)
    with FlopCounterMode(display=False) as counter:
        sampled_svd(x, 4, ALONE, passes=passes)
    assert counter.get_total_flops() == pytest.approx(
        _flops(svd_work(2, 30_000, 96, 4, passes).flops, passes), rel=0.02
    )


def _flops(products: float, passes: int) -> float:
    """With (X Q)^T (X Q), which is small where there are more features than columns: not here."""
    return products + 2 * 2.0 * 30_000 * (12 * (passes + 1)) ** 2


def test_flops_of_a_certificate() -> None:
    x = torch.randn(30_000, 72)
    sizes = _sizes(d=72, layers=1, rows=30_000, rank=2)
    with FlopCounterMode(display=False) as counter:
        split_half_certificate(x, 2, ALONE)
    inner = 2.0 * 30_000 * (10 * (COLD_PASSES + 1)) ** 2
    assert counter.get_total_flops() == pytest.approx(spectrum_work(sizes)["certificate"].flops + inner, rel=0.03)


def test_numbers_follow_from_each_other(benchmark_json: Callable[..., dict[str, Any]]) -> None:
    numbers = benchmark_json("spectrum", *SIZES)
    parts, share = numbers["parts"], numbers["share"]
    assert set(parts) == set(PARTS)
    for part in parts.values():
        assert part["seconds"] > 0 and part["where"] in ("device", "beside") and part["what"]
        assert part["moved_bytes"] >= 0 and part["held_bytes"] >= 0
    assert {name for name, part in parts.items() if not part["every_check"]} == {"svd_cold", "documents_svd_cold"}
    recurring = {name for name, part in parts.items() if part["every_check"]}
    assert numbers["check_seconds"] == pytest.approx(sum(parts[name]["seconds"] for name in recurring))
    # All columns of the basis fit into d = 32 only for one pass.
    assert parts["svd_warm"]["moved_bytes"] == documented_bytes(3, 32, 4, 1)
    assert parts["certificate"]["moved_bytes"] == svd_work(6, 48, 32, 4, COLD_PASSES).moved_bytes
    assert parts["documents_svd"]["moved_bytes"] == documented_bytes(3, 32, 4, 1) + 4 * 3 * 64 * 4
    assert parts["token_coordinates"]["moved_bytes"] == 4 * 3 * 96 * 4
    assert parts["sampling"]["held_bytes"] == 4 * 3 * 32 * (4 * 96 + 64) + 32 * 4 * 96 + 24 * 64
    assert numbers["memory"]["peak_bytes"] > 0

    measured = share["measured"]
    assert set(measured["seconds"]) == recurring
    inputs = measured["inputs"]
    assert (inputs["ranks"], inputs["steps_between_checks"], inputs["blocks"]) == (1, 5, 2)
    assert measured["training_seconds"] == pytest.approx(5 * inputs["step_seconds"])

    projected = share["projected"]
    assert not projected["same_sizes"]
    inputs = projected["inputs"]
    assert inputs["ranks"] == 2 and inputs["tokens_per_step"] == BATCH
    rate = numbers["machine"]["gemm_flops_per_second"]["bf16"]
    assert projected["training_seconds"] == pytest.approx(5 * inputs["step_flops"] / (2 * rate))
    for name in recurring:
        assert projected["seconds"][name] == pytest.approx(parts[name]["seconds"] * inputs["work_scale"][name])
    # The thread has one step's time; only what it takes longer makes training wait.
    beside = sum(projected["seconds"][name] for name, part in parts.items() if part["where"] == "beside")
    spare = inputs["step_flops"] / (2 * projected["on_accelerator"]["inputs"]["accelerator_flops"])
    assert projected["on_accelerator"]["inputs"]["scale"]["detect"] == pytest.approx(max(0, 1 - spare / beside))
    for view in (measured, projected, projected["on_accelerator"]):
        assert view["check_seconds"] == pytest.approx(sum(view["seconds"].values()))
        assert view["share"] == pytest.approx(view["check_seconds"] / view["training_seconds"])
        assert view["within_target"] == (view["share"] <= share["target"] == 0.005)


def test_work_of_a_run_scales_with_its_sizes(benchmark_json: Callable[..., dict[str, Any]]) -> None:
    """From the command's sizes to those of the run file: 2 blocks, d 16, 64 rows, 48 documents, one block a rank."""
    scale = benchmark_json("spectrum", *SIZES)["share"]["projected"]["inputs"]["work_scale"]
    # Offered: 128 tokens of a rank in each of 5 steps, for 32 tokens of 3 blocks with d = 32.
    assert scale["sampling"] == pytest.approx(128 * 5 * 2 * 16 / (32 * 3 * 32))
    assert scale["detect"] == pytest.approx(48**2 / (3 * 64**2))
    assert scale["token_line"] == pytest.approx(64**2 / (3 * 96**2))
    assert scale["balanced_kmeans"] == pytest.approx(48 / (3 * 64))
    # One pass: q = 12 of 16 columns are there, so that 4 more fit; of 32 columns 24.
    assert scale["svd_warm"] == pytest.approx(2 * 64 * 16 * (4 * 12 + 2 * 16) / (3 * 96 * 32 * (4 * 12 + 2 * 24)))


def test_text_says_parts_shares_and_inputs(
    run_file: Any, benchmark_json: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["spectrum", *map(str, SIZES), "--small", str(run_file), "--large", str(run_file), "--ranks", "2"]
    assert main([*command, "--gemm-size", "64", "--repeats", "1"]) == 0
    text = capsys.readouterr().out
    for words in (*PARTS, "one check of 3 blocks", "of training", "step_flops = ", "gemm_flops_per_second = ", "rough"):
        assert words in text
    assert str(run_file) in text


def test_clusters_are_planted() -> None:
    x, label = planted_features(600, 64, 4, 0, torch.device("cpu"))
    space = sampled_svd(x, 8, ALONE)
    assert space.explained[:3].sum() > 0.5
    assert detect((x - space.mean) @ space.basis[:, :3]).count >= 2
    assert label.unique().numel() == 4


def test_bf16_store(benchmark_json: Callable[..., dict[str, Any]]) -> None:
    numbers = benchmark_json("spectrum", *SIZES, "--store", "bf16")
    assert numbers["sizes"]["store"] == "bf16" and numbers["parts"]["svd_warm"]["moved_bytes"] > 0


def test_memory_is_estimated_before_it_is_taken() -> None:
    assert 4.3e9 < peak_bytes(_sizes(d=4096, layers=32, rows=8192, rank=8), 4) < 12e9
    assert peak_bytes(_sizes(d=4096, layers=32, rows=8192, rank=8), 2) < 4.3e9
    with pytest.raises(
        MocteError, match=r"500 layers x 100000 rows x 100000 features in fp32 needs about .* GB .* bf16"
    ):
        main(["spectrum", "--d", "100000", "--layers", "500", "--rows", "100000", *_device()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "1"], "--rows 1 must be at least 2"),
        (["--rank", "9", "--d", "8"], "--d 8 must be at least 9"),
        (["--documents", "20", "--experts", "30"], "--documents 20 must be at least 30"),
        (["--layers", "0"], "--layers 0 must be at least 1"),
        (["--context", "4"], "--context 4 must be at least 16"),
    ],
)
def test_impossible_sizes_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(MocteError, match=message):
        main(["spectrum", *options, *_device()])


@pytest.mark.gpu
def test_on_a_gpu(run_file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "spectrum",
        *map(str, SIZES),
        "--small",
        str(run_file),
        "--large",
        str(run_file),
        "--ranks",
        "2",
        "--json",
    ]
    assert main([*command, "--device", "cuda", "--gemm-size", "64"]) == 0
    assert '"kind": "cuda"' in capsys.readouterr().out


def _device() -> list[str]:
    return ["--device", "cpu"]


def _sizes(d: int, layers: int, rows: int, rank: int) -> SpectrumSizes:
    return SpectrumSizes(d, layers, rows, 4096, rank, 8, 4096, 1, 4096, layers)
