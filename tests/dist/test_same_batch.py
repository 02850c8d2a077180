"""Batches of tensor ranks: what differs stops all ranks of a run with one message, by one exchange."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from mocte_ds.dist.mesh import ALONE, Axis, Mesh
from mocte_ds.dist.same_batch import require_same_batch
from mocte_ds.errors import DataError
from tests.spawn import spawn

# What each of four ranks is given in each case; neighbours are a tensor group.
IDS = torch.arange(12).view(3, 4)
CASES: dict[str, list[dict[str, Any]]] = {
    "as it should be": [{"input_ids": IDS + rank // 2, "labels": IDS} for rank in range(4)],
    "other values": [{"input_ids": IDS + (rank == 3)} for rank in range(4)],
    "other order": [{"input_ids": IDS.flip(0) if rank == 2 else IDS} for rank in range(4)],
    "other shape": [{"input_ids": IDS.view(4, 3) if rank == 2 else IDS} for rank in range(4)],
    "other names": [{"input_ids": IDS, **({"labels": IDS} if rank == 0 else {})} for rank in range(4)],
    "deep within": [{"batch": {"texts": [{"ids": IDS * (1 + (rank == 1))}]}} for rank in range(4)],
    "features": [{"inputs_embeds": IDS / 3 + (1e-7 if rank == 1 else 0.0)} for rank in range(4)],
    "everywhere": [{"input_ids": IDS + rank} for rank in range(4)],
}


def told() -> dict[tuple[str, bool], str]:
    """What this rank hears in each case, in a pass that trains and in another; how often it exchanges something."""
    rank, found = dist.get_rank(), {}
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    world, tensor = Axis.of(dist.group.WORLD), Axis.of(groups[rank // 2])
    mesh = Mesh(world, world, ALONE, world, tensor)
    for name, given in CASES.items():
        for trains in (True, False):
            with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as exchanged:
                try:
                    require_same_batch((), given[rank], mesh, trains)
                    found[name, trains] = "nothing"
                except DataError as error:
                    found[name, trains] = str(error)
                assert exchanged.call_count == 1
    with mock.patch.object(dist, "all_gather", side_effect=AssertionError):
        require_same_batch((), CASES["everywhere"][rank], Mesh(world, world, ALONE, world, ALONE), True)
    return found


def test_all_ranks_refuse_together_and_name_those_that_differ() -> None:
    ranks = spawn(told, 4, timeout=90)
    for (name, trains), text in ranks[0].items():
        texts = [found[name, trains] for found in ranks]
        apart = {"as it should be": "", "other values": "2, 3", "other order": "2, 3", "other shape": "2, 3"}
        named = apart.get(name, "0, 1")
        if name == "everywhere":
            assert texts[0].startswith("the ranks 0, 1 ") and texts[3].startswith(
                "the ranks 0, 1 and the ranks 2, 3 " if trains else "the ranks 2, 3 "
            )
        elif not named:
            assert set(texts) == {"nothing"}
        elif trains:
            assert set(texts) == {text} and text.startswith(f"the ranks {named} were given different batches"), name
        else:
            of_group = [text for rank, text in enumerate(texts) if str(rank) in named]
            assert all(one.startswith(f"the ranks {named} were given") for one in of_group), name
            assert texts.count("nothing") == 2
