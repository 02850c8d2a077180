"""Numbers and token counts of all ranks in one exchange, in real processes; against sums that the test makes."""

from types import SimpleNamespace

import torch
import torch.distributed as dist

from mocte_ds.controller.passes import Passes
from mocte_ds.dist.mesh import ALONE, Axis, Mesh
from mocte_ds.moe.loads import Loads
from tests.spawn import spawn

EXPERTS = [[3, 2], [4]]
"""Of each bank of each block."""
BIG = 1 << 53  # one more than this is no fp64 number


def counted(data_rank: int) -> list[list[int]]:
    """Tokens by block, as the ranks of one data rank have counted them."""
    return [[BIG * (1 - data_rank) + data_rank + 10 * k for k in range(sum(banks))] for banks in EXPERTS]


def said(rank: int) -> list[float]:
    """Numbers that fp32 and text would round."""
    return [0.1 + rank, float("nan") if rank == 2 else -0.0, 1e300]


def _passes(mesh: Mesh) -> Passes:
    blocks = []
    for counts, experts in zip(counted(mesh.data.rank), EXPERTS, strict=True):
        banks = []
        for number, part in zip(experts, torch.tensor(counts).split(experts), strict=True):
            banks.append(SimpleNamespace(loads=Loads(number), num_experts=number))
            banks[-1].loads.total += part
        blocks.append(SimpleNamespace(block=SimpleNamespace(banks=banks, num_experts=sum(experts))))
    return Passes(SimpleNamespace(mesh=mesh, blocks=blocks))  # type: ignore[arg-type]


def _tell() -> dict:
    rank = dist.get_rank()
    tensor = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    data = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    world = Axis.of(dist.group.WORLD)
    passes = _passes(Mesh(world, Axis.of(data), ALONE, world, Axis.of(tensor)))
    calls: list[str] = []
    for name in ("all_gather", "all_reduce", "broadcast", "all_gather_object", "all_gather_into_tensor"):
        plain = getattr(dist, name)
        setattr(
            dist, name, lambda *args, _plain=plain, _name=name, **rest: (calls.append(_name), _plain(*args, **rest))
        )
    numbers, first = passes.tell(said(rank))
    exchanges = len(calls)
    passes._banks[0].loads.total += 1
    return {
        "numbers": numbers,
        "first": first,
        "exchanges": exchanges,
        "second": passes.tell([])[1],
        "routed": [part.tolist() for part in passes.routed()],
        "told": [part.tolist() for part in passes.tell_routed([])[1]],
    }


def test_ranks_of_a_tensor_group_count_once() -> None:
    sums = [
        [one + other for one, other in zip(*pair, strict=True)] for pair in zip(counted(0), counted(1), strict=True)
    ]
    bits = torch.tensor([said(rank) for rank in range(4)], dtype=torch.float64).view(torch.int64)
    for found in spawn(_tell, 4):
        assert torch.equal(found["numbers"].view(torch.int64), bits)
        assert found["first"] == sums and found["exchanges"] == 1
        assert found["second"] == [[2, 2, 2, 0, 0], [0] * 4], "what has come since, of two data ranks"
        assert found["told"] == found["routed"]
