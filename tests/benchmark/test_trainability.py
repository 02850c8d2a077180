"""The benchmark of trainability: FLOPs against a counter, numbers against each other, and the whole check."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mocte_ds.benchmark import trainability as module
from mocte_ds.benchmark.check import probe_sequences
from mocte_ds.benchmark.measure.run_plan import read_plan
from mocte_ds.benchmark.trainability import ExpertSizes, trainability_work
from mocte_ds.controller.probe import ProbeSet
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.errors import MocteError
from mocte_ds.flops.ledger import forward_flops
from mocte_ds.trainability import top_eigenpair
from tests.benchmark.conftest import BATCH
from tools.benchmark import main

MESH = mesh_of_processes()

SIZES = ["--d", 16, "--width", 40, "--rows", 12, "--experts", 3, "--iterations", 4]


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_flops_of_an_eigenvalue(style: Any) -> None:
    sizes = ExpertSizes(d=48, width=112, rows=32, experts=1, iterations=6, style=style)
    expert = module._expert(sizes, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        top_eigenpair(expert, torch.randn(32, 48), iterations=6, tolerance=0.0)
    assert counter.get_total_flops() == pytest.approx(trainability_work(sizes)["trainability"].flops, rel=0.05)


def test_numbers_follow_from_each_other(benchmark_json: Callable[..., dict[str, Any]]) -> None:
    numbers = benchmark_json("trainability", *SIZES)
    (part,) = numbers["parts"].values()
    assert part["seconds"] == pytest.approx(3 * numbers["seconds_per_expert"]) and part["moved_bytes"] == 3 * 24
    assert numbers["seconds_per_expert_until_converged"] > 0
    # Three matrices, five (n, f), two Gram matrices, two Lanczos bases.
    assert part["held_bytes"] == 4 * (3 * 16 * 40 + 5 * 12 * 40 + 2 * 12 * 12 + 2 * 4 * 12 * 16)
    measured, projected = numbers["share"]["measured"], numbers["share"]["projected"]
    assert measured["inputs"]["local_experts"] == 8 and projected["inputs"]["local_experts"] == 4
    scale = projected["inputs"]["work_scale"]["trainability"]
    four = trainability_work(ExpertSizes(16, 24, 16, 4, 3, "llama"))["trainability"].flops
    assert scale == pytest.approx(four / part["flops"])
    assert projected["seconds"] == {"trainability": pytest.approx(part["seconds"] * scale)}
    between = 5 * projected["inputs"]["step_flops"] / 2
    assert projected["flop_share"] == pytest.approx(four / between)
    stated, machine = projected["on_accelerator"], numbers["machine"]
    gains = {machine["gemm_flops_per_second"]["fp32"] / 4e13, machine["copy_bytes_per_second"] / 2e12}
    slow = part["flops"] / part["seconds"] < machine["gemm_flops_per_second"]["fp32"] / 2
    gain = max(gains) if slow else machine["gemm_flops_per_second"]["fp32"] / 4e13
    assert stated["inputs"]["scale"]["trainability"] == gain
    assert stated["seconds"]["trainability"] == pytest.approx(part["seconds"] * scale * gain)
    assert stated["seconds"]["network"] == pytest.approx(4 * 24 / 1e10)
    assert stated["training_seconds"] == pytest.approx(between / 4e14)


def test_a_whole_check_is_both(benchmark_json: Callable[..., dict[str, Any]], run_file: Any) -> None:
    numbers = benchmark_json("check")
    spectrum = benchmark_json("spectrum", *["--d", 16, "--rows", 32, "--documents", 32, "--layers", 1, "--context", 16])
    assert set(numbers["parts"]) == {*spectrum["parts"], "trainability", "progress"}
    # 4 experts x 4 x 16 rows are 256 tokens, 8 sequences of 32, 4 of them on each of two ranks. A pass, and at a tenth
    # of the checks one for each of the two blocks and two for the conflict.
    flops = 1.4 * 4 * 32 * forward_flops(read_plan(run_file, 2).sizes, 32)
    assert numbers["parts"]["progress"]["flops"] == pytest.approx(flops)
    share = numbers["share"]
    assert share["projected"]["same_sizes"]
    assert share["projected"]["inputs"]["work_scale"]["svd_warm"] == 1.0
    for view in (share["measured"], share["projected"]):
        assert set(view["seconds"]) == {name for name, part in numbers["parts"].items() if part["every_check"]}
        assert view["share"] == pytest.approx(sum(view["seconds"].values()) / view["training_seconds"])
    text = module_text(numbers)
    assert "balanced_kmeans" in text and "trainability" in text and "rough" not in text


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("wanted", [0, 40, 96])
def test_probe_sequences_are_those_that_a_rank_takes(run_file: Any, ranks: int, wanted: int) -> None:
    plan = read_plan(run_file, ranks)
    plan = replace(plan, config=replace(plan.config, probe_tokens=wanted))
    tokens, own, taken = wanted or 4 * 4 * 16, BATCH // 32 // ranks, []
    for rank in range(ranks):
        probe = ProbeSet(tokens, None, MESH)
        for place in range(rank * own, (rank + 1) * own, min(2, own)):
            ids = torch.zeros(min(2, own), 32, dtype=torch.int64)
            probe.offer((), {"input_ids": ids}, place, BATCH // 32)
        probe.finish()
        taken.append(len(probe.number))
    assert probe_sequences(plan) == max(taken)


def module_text(numbers: dict[str, Any]) -> str:
    from mocte_ds.benchmark import load

    return load(numbers["benchmark"]).text(numbers)


def test_text(benchmark_json: Callable[..., dict[str, Any]]) -> None:
    text = module_text(benchmark_json("trainability", *SIZES, "--style", "gpt2"))
    assert "3 experts of 16 x 40 (gpt2) on 12 rows each, 4 iterations" in text and "s an expert" in text


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(MocteError, match="--width 0 must be at least 1"):
        main(["trainability", "--width", "0", "--device", "cpu"])
    with pytest.raises(MocteError, match=r"1000000 x 1000000 on 256 rows needs about .* GB .* smaller --width"):
        main(["trainability", "--d", "1000000", "--width", "1000000", "--device", "cpu"])
