"""A checkpoint goes on in every layout, written by the tool or read on the fly: the same losses, the same moments."""

from pathlib import Path
from typing import Any

import torch
from pytest import approx, fixture, mark

from mocte_ds.checkpoints.manifest import require_whole
from mocte_ds.checkpoints.reshaping.reshape import reshape
from mocte_ds.ownership.manifest import Manifest
from tests.checkpoints.damage import digest
from tests.checkpoints.reshaping import travel
from tests.spawn import spawn
from tests.zero.small_run import FINAL_MODES, Case

# Behind an emergence and freezes in one step; with experts of one rank all frozen; with all of the model frozen.
STOPS = (5, 8, 14)
START = f"step{STOPS[0]}"
HOPS = (Case(2, 1, 1), Case(4, 4, 2, offload=True, optimizer="cpu"), Case(2, 2, 2))


def merged(ranks: list[dict[str, Any]], way: str, what: str) -> dict[str, list[torch.Tensor]]:
    """What the ranks gathered, of all experts."""
    return {name: values for rank in ranks for name, values in rank[way][what].items()}


def mean_losses(ranks: list[dict[str, Any]], way: str) -> list[float]:
    return torch.tensor([rank[way]["losses"] for rank in ranks], dtype=torch.float64).mean(0).tolist()


def assert_equal(found: dict[str, list[torch.Tensor]], expected: dict[str, list[torch.Tensor]], bitwise: bool) -> None:
    assert found.keys() == expected.keys() and found
    for name, values in expected.items():
        for value, other in zip(values, found[name], strict=True):
            assert torch.equal(value, other) if bitwise else torch.allclose(value, other, rtol=0, atol=1e-5), name


@fixture(scope="module")
def first_part(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """Folder with a checkpoint of two ranks with ep_size 2, and what became of the run without an interruption."""
    folder = tmp_path_factory.mktemp("travel")
    ways = {"start": ("", str(folder / "start"))}
    case = Case(2, 2, 2)
    return folder, spawn(travel.go_on, 2, case, 0, STOPS[0], ways, timeout=120, deepspeed=True)


def test_ep_2_to_1_to_4_to_2_keeps_the_curve(first_part):
    """Each hop twice: the checkpoint is reshaped by the tool, and another one is loaded as it is."""
    folder, ranks = first_part
    whole = mean_losses(ranks, "whole")
    before, sources = ranks, {"tool": folder / "start", "fly": folder / "start"}
    for number, case in enumerate(HOPS):
        first, last = STOPS[number], (*STOPS, travel.END)[number + 1]
        cut = folder / f"cut{number}"
        reshape(sources["tool"], cut, case.world, case.ep)
        ways = {"tool": (str(cut), str(folder / f"tool{number}"))}
        ways["fly"] = (str(sources["fly"]), str(folder / f"fly{number}"))
        after = spawn(travel.go_on, case.world, case, first, last, ways, timeout=150, deepspeed=True)
        for way in ways:
            assert_equal(
                merged(after, way, "loaded"), merged(before, way if number else "start", "saved"), bitwise=True
            )
            assert mean_losses(after, way) == approx(whole[first:last], rel=0, abs=1e-5)
            sources[way] = folder / f"{way}{number}"
        assert after[0]["tool"]["note"] is None
        assert f"it is brought to {case.world} ranks with ep_size {case.ep}" in after[0]["fly"]["note"]
        before = after
    for way in ("tool", "fly"):
        assert_equal(merged(before, way, "saved"), merged(ranks, "whole", "saved"), bitwise=False)
        for mine, expected in zip(before, ranks, strict=True):
            assert mine[way]["rates"] == approx(expected["whole"]["rates"])
    state = torch.load(folder / "fly2" / f"step{travel.END}" / "mocte_state.pt", weights_only=True)
    assert [block["experts"] for block in state["mocte"]["blocks"]] == FINAL_MODES
    runs = {Manifest.read(folder / name / tag).run for name, tag in (("start", START), ("fly2", f"step{travel.END}"))}
    assert len(runs) == 1


def test_there_and_back_changes_no_bit(first_part, tmp_path):
    folder, _ = first_part
    before = digest(folder / "start")
    source = folder / "start"
    for number, (world, ep) in enumerate([(2, 1), (8, 4), (1, 1), (4, 2), (2, 2)]):
        facts = reshape(source, tmp_path / str(number), world, ep)
        assert (facts["step"], facts["after"]) == (STOPS[0], f"{world} rank{'s' * (world > 1)} with ep_size {ep}")
        source = tmp_path / str(number)
        manifest = require_whole(source / START)
        assert (source / "latest").read_text() == START and manifest.world_size == world
        assert manifest.run == Manifest.read(folder / "start" / START).run
    assert digest(folder / "start") == before
    names = {path.name for path in (folder / "start" / START).iterdir()}
    assert {path.name for path in (source / START).iterdir()} == names
    for name in sorted(name for name in names if name.endswith(".pt")):
        one, other = (torch.load(where / START / name, weights_only=True) for where in (folder / "start", source))
        if name == "mocte_random_rank0.pt":
            del one["mocte"]  # samples: a new number of ranks collects them anew
        if name == "mocte_random_rank1.pt":
            continue  # the second rank had gone on the way
        assert_same(one, other, name)


def assert_same(one: Any, other: Any, where: str) -> None:
    """Equal values in equal containers, in the same order."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other) and getattr(one, "__dict__", None) == getattr(other, "__dict__", None), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    elif torch.is_tensor(one):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    else:
        assert one == other, where


@fixture(scope="module")
def variants(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("variants")
    return folder, spawn(travel.write_variants, 2, str(folder), timeout=150, deepspeed=True)


@mark.parametrize(("world", "ep", "first"), [(4, 2, True), (1, 1, False)])
def test_kinds_of_experts_routers_fronts_and_dense_runs(variants, world, ep, first):
    folder, expected = variants
    before = digest(folder)
    found = spawn(travel.load_variants, world, str(folder), ep, first, timeout=150, deepspeed=True)
    for name in (*travel.VARIANTS, "dense"):
        assert_equal(merged(found, name, "loaded"), merged(expected, name, "saved"), bitwise=True)
        assert mean_losses(found, name) == approx(mean_losses(expected, name), rel=0, abs=1e-5), name
        assert {rank[name]["client"] for rank in found} == {48}
        assert "written by 2 ranks with ep_size" in found[0][name]["note"]
        assert len({rank[name]["drawn"] for rank in found}) == world, "ranks that are new draw numbers of their own"
    assert digest(folder) == before
