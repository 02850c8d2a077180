"""The collectives, in real processes; each result is compared with what one process computes from all ranks' values."""

import os

import pytest
import torch
import torch.distributed as dist

from mocte_ds.dist.collectives import (
    from_rank_zero,
    gather_objects,
    gather_rows,
    max_over_ranks,
    require_same,
    stack_over_ranks,
    sum_over_ranks,
    wait_for_all,
)
from mocte_ds.dist.mesh import ALONE, Axis, mesh_of_processes
from mocte_ds.errors import Disagreement, MocteError
from tests.spawn import spawn


def _mine(rank: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(rank * 2, 3, 5, generator=generator) * 1000).to(dtype)


def _one(rank: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(3, 5, generator=torch.Generator().manual_seed(rank)) * 1000).to(dtype).t()  # not contiguous


def _exercise() -> dict:
    axis = mesh_of_processes().world
    rank = axis.rank
    out = {"world": (rank, axis.size), "env": (os.environ["RANK"], os.environ["WORLD_SIZE"], torch.get_num_threads())}
    half = torch.full((4,), 1.0 + rank, dtype=torch.bfloat16)
    out["sum"], out["untouched"] = sum_over_ranks(half, axis), half
    out["max"] = max_over_ranks(torch.tensor([rank, -rank]), axis)
    out["max_bool"] = max_over_ranks(torch.tensor([rank == 1, False]), axis)
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.float64)
    out["rows"] = {dtype: gather_rows(_mine(rank, dtype), axis) for dtype in dtypes}
    out["keys"] = gather_rows(torch.tensor([(1 << 62) + rank, -rank]), axis)
    out["bools"] = gather_rows(torch.tensor([rank == 0]), axis)
    out["nothing"] = gather_rows(torch.empty(0, 7), axis).shape
    out["stacked"] = {dtype: stack_over_ranks(_one(rank, dtype), axis) for dtype in dtypes}
    out["stacked_nothing"] = stack_over_ranks(torch.empty(0, 7), axis).shape
    out["objects"] = gather_objects({"rank": rank}, axis)
    out["zero"] = from_rank_zero(torch.arange(6.0).view(2, 3).bfloat16() if rank == 0 else None, axis)
    out["zero_empty"] = from_rank_zero(torch.empty(0, 2) if rank == 0 else 3, axis)
    out["zero_object"] = from_rank_zero("hello" if rank == 0 else 3, axis)
    require_same({"a": [1, torch.arange(3)]}, "equal things", axis)
    try:
        require_same([1, 2, 3, rank if rank == 2 else 0], "the plan", axis)
    except Disagreement as error:
        out["disagreement"] = str(error)
    try:
        require_same(torch.zeros(100) + (rank == 1) * 1e-30, "weights", axis)
    except Disagreement as error:
        out["tensors"] = str(error)
    pair = dist.new_group([1, 2])
    if rank in (1, 2):
        two = Axis.of(pair)
        summed = int(sum_over_ranks(torch.tensor(rank), two))
        out["pair"] = ((two.rank, two.size), summed, from_rank_zero(rank, two))
        out["pair_tensor"] = from_rank_zero(torch.tensor(rank), two)
        wait_for_all(two)
    else:
        with pytest.raises(MocteError, match="belongs to"):
            Axis.of(pair)
    return out


def test_three_ranks_agree_with_one_process() -> None:
    results = spawn(_exercise, 3)
    for rank, out in enumerate(results):
        assert out["world"] == (rank, 3)
        assert out["env"] == (str(rank), "3", 1)
        assert out["sum"].tolist() == [6.0] * 4 and out["sum"].dtype == torch.bfloat16
        assert out["untouched"].tolist() == [1.0 + rank] * 4
        assert out["max"].tolist() == [2, 0]
        assert out["max_bool"].tolist() == [True, False]
        for dtype, rows in out["rows"].items():
            assert torch.equal(rows, torch.cat([_mine(r, dtype) for r in range(3)])), dtype
        for dtype, stacked in out["stacked"].items():
            assert torch.equal(stacked, torch.stack([_one(r, dtype) for r in range(3)])), dtype
        assert out["stacked_nothing"] == (3, 0, 7)
        assert out["keys"].tolist() == [1 << 62, 0, (1 << 62) + 1, -1, (1 << 62) + 2, -2]
        assert out["bools"].tolist() == [True, False, False]
        assert out["nothing"] == (0, 7)
        assert out["objects"] == [{"rank": r} for r in range(3)]
        assert torch.equal(out["zero"], torch.arange(6.0).view(2, 3).bfloat16())
        assert out["zero_empty"].shape == (0, 2)
        assert out["zero_object"] == "hello"
        assert "the plan" in out["disagreement"]
        assert "[1, 2, 3, 0]" in out["disagreement"] and "rank 2 has [1, 2, 3, 2]" in out["disagreement"]
        assert "rank 1 has tensor" in out["tensors"]
    assert results[2]["pair"] == ((1, 2), 3, 1)
    assert int(results[2]["pair_tensor"]) == 1


def test_without_a_group_nothing_happens() -> None:
    t = torch.randn(3, 2)
    mesh = mesh_of_processes()
    assert {mesh.world, mesh.data, mesh.expert, mesh.expert_data, mesh.tensor} == {ALONE}
    for function in (sum_over_ranks, max_over_ranks, gather_rows, from_rank_zero):
        assert function(t, mesh.data) is t
    assert gather_objects("x", mesh.world) == ["x"]
    require_same(t, "anything", mesh.world)
    wait_for_all(mesh.world)
    with pytest.raises(MocteError, match="needs a process group"):
        Axis.of(None)


def _through_deepspeed() -> float:
    import deepspeed.comm as comm

    assert comm.is_initialized()
    return float(sum_over_ranks(torch.tensor(1.5), mesh_of_processes().data))


def test_deepspeed_can_make_the_group() -> None:
    assert spawn(_through_deepspeed, 2, deepspeed=True) == [3.0, 3.0]
