"""What the reshape tool refuses, by name, before it writes anything and without a change to the source; its memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pytest import MonkeyPatch, fixture, mark, raises

from mocte_ds.checkpoints import place
from mocte_ds.checkpoints.load import STATE_FILE
from mocte_ds.checkpoints.manifest import require_whole
from mocte_ds.checkpoints.names import EXPERT_FILE, MODEL_FILE, OPTIMIZER_FILE
from mocte_ds.checkpoints.random_states import RANDOM_FILE
from mocte_ds.checkpoints.reshaping.reshape import reshape
from mocte_ds.checkpoints.reshaping.saved import SavedCheckpoint
from mocte_ds.errors import CheckpointError
from mocte_ds.ownership.manifest import MANIFEST_FILE
from tests.checkpoints.by_hand import sign
from tests.checkpoints.damage import cut, digest, flip, plant, seal, swap

FIRST, SECOND = (OPTIMIZER_FILE.format(precision="bf16_", rank=rank) for rank in range(2))
EXPERT = EXPERT_FILE.format(layer=1, expert=2)
OLD_FORM = {"_use_new_zipfile_serialization": False}
TOOL = Path(__file__).resolve().parents[3] / "tools" / "reshape.py"


@fixture
def fresh(written, tmp_path) -> Path:
    """A checkpoint of two ranks with ep_size 2, to damage."""
    return written.copy("ffn", tmp_path / "in")


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Change the content of a file."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def state_of(content: dict[str, Any]) -> dict[str, Any]:
    return content["optimizer_state_dict"]


def groups_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    return state_of(content)["base_optimizer_state"]["param_groups"]


def moments_of(content: dict[str, Any], number: int) -> dict[str, Any]:
    return state_of(content)["base_optimizer_state"]["state"][number]


ACCIDENTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: (folder / SECOND).unlink(), f"{SECOND} is missing"),
    "truncated": (lambda folder: cut(folder / SECOND, -9), rf"{SECOND} is truncated to \d+ of \d+ bytes"),
    "flipped": (lambda folder: flip(folder / SECOND, 0.5), f"{SECOND} was changed"),
    "renamed": (
        lambda folder: (folder / EXPERT).rename(folder / "expert.pt"),
        rf"{EXPERT} is missing \(expert.pt holds its content",
    ),
    "mixed up": (lambda folder: swap(folder / FIRST, folder / SECOND), f"{FIRST} holds the content of {SECOND}"),
    "no manifest": (lambda folder: (folder / MANIFEST_FILE).unlink(), f"{MANIFEST_FILE} is missing"),
}


@mark.parametrize("case", ACCIDENTS)
def test_damage(fresh, tmp_path, case):
    damage, message = ACCIDENTS[case]
    damage(fresh)
    refused(fresh, tmp_path / "out", message)


def refused(folder: Path, out: Path, message: str, world: int = 4, ep: int = 4) -> None:
    """Reshaping must fail with a message, and leave the source as it is and nothing else behind."""
    before = digest(folder.parent)
    with raises(CheckpointError, match=message):
        reshape(folder, out, world, ep)
    assert not out.exists() and digest(folder.parent) == before


# Somebody, or a careless copy, has made the manifest agree.
CONTRADICTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "shards mixed up": (
        lambda folder: swap(folder / FIRST, folder / SECOND),
        f"{SECOND} holds model.layers.* where another parameter belongs: it is of another rank",
    ),
    "a shard twice": (
        lambda folder: (folder / SECOND).write_bytes((folder / FIRST).read_bytes()),
        r"_optim_states.pt holds .* it is of another rank or another run",
    ),
    "shard of a later step": (
        lambda folder: edit(folder / SECOND, lambda content: moments_of(content, 0)["step"].add_(1)),
        f"{SECOND} has other steps of the optimizer than .*{FIRST}: of two checkpoints",
    ),
    "another learning rate": (
        lambda folder: edit(folder / SECOND, lambda content: groups_of(content)[0].update(lr=7.0)),
        f"{SECOND} has another learning rate, decay or kind of a group than .*{FIRST}",
    ),
    "another state": (
        lambda folder: edit(folder / SECOND, lambda content: state_of(content).update(clip_grad=7.0)),
        f"{SECOND} has another state of the optimizer than .*{FIRST}",
    ),
    "shard of another model": (
        lambda folder: edit(
            folder / SECOND, lambda c: state_of(c)["single_partition_of_fp32_groups"].insert(0, torch.zeros(2))
        ),
        f"{SECOND} is not an optimizer's file of ours: ValueError",
    ),
    "moments of another shape": (
        lambda folder: edit(folder / SECOND, lambda c: moments_of(c, 0).update(exp_avg=torch.zeros(2, 2))),
        f"{SECOND} is not an optimizer's file of ours: ValueError: its exp_avg has the shape",
    ),
    "a unit of nobody": (
        lambda folder: edit(folder / SECOND, lambda content: groups_of(content)[0].update(unit="other")),
        "_optim_states.pt holds a part of (trunk|other), as 1 of the ranks",
    ),
    "code in a shard": (
        lambda folder: plant(folder / SECOND, folder.parent.parent / "made"),
        f"{SECOND} cannot be read: UnpicklingError",
    ),
    "code in our file": (
        lambda folder: plant(folder / STATE_FILE, folder.parent.parent / "made", as_zip=False),
        f"{STATE_FILE} cannot be read: UnpicklingError",
    ),
    "an old form": (
        lambda folder: torch.save({"optimizer_state_dict": torch.ones(2)}, folder / SECOND, **OLD_FORM),
        f"{SECOND} cannot be read: UnpicklingError: it is not a file that torch.save writes",
    ),
    "a transposed tensor": (
        lambda folder: edit(folder / SECOND, lambda c: moments_of(c, 0).update(exp_avg=torch.ones(2, 3).T)),
        f"{SECOND} holds a tensor in another form than ours",
    ),
    "no zip": (lambda folder: (folder / MODEL_FILE).write_bytes(b"x" * 999), f"{MODEL_FILE} cannot be read"),
    "tensor parallelism": (
        lambda folder: (folder / "mp_rank_01_model_states.pt").write_bytes(b"x"),
        "mp_rank_01_model_states.pt is of an architecture that is not supported",
    ),
    "ZeRO-3": (
        lambda folder: edit(folder / SECOND, lambda content: state_of(content).update(zero_stage=3)),
        f"{SECOND} is of ZeRO stage 3: only 1 and 2",
    ),
    "elastic": (
        lambda folder: edit(folder / FIRST, lambda content: state_of(content).update(base_optimizer_state=[])),
        f"{FIRST} is of zero_optimization.elastic_checkpoint",
    ),
    "round robin": (
        lambda folder: edit(
            folder / MODEL_FILE,
            lambda content: content["ds_config"]["zero_optimization"].update(round_robin_gradients=True),
        ),
        "was written with zero_optimization.round_robin_gradients",
    ),
    "a rank too many": (
        lambda folder: (folder / RANDOM_FILE.format(rank=2)).write_bytes(b"x"),
        f"{RANDOM_FILE.format(rank=2)} is of a rank that the checkpoint of 2 ranks does not have",
    ),
    "model of other ranks": (
        lambda folder: edit(folder / MODEL_FILE, lambda content: content.update(dp_world_size=4)),
        f"{MODEL_FILE} is of 4 data-parallel and 1 model-parallel ranks",
    ),
    "impossible ep_size": (
        lambda folder: edit(folder / STATE_FILE, lambda content: content["mocte"]["config"].update(ep_size=3)),
        f"{STATE_FILE} has ep_size 3, which does not fit 2 ranks and 4 experts",
    ),
}


@mark.parametrize("case", CONTRADICTIONS)
def test_what_contradicts_itself_under_a_manifest_that_agrees(fresh, tmp_path, case):
    damage, message = CONTRADICTIONS[case]
    damage(fresh)
    seal(fresh)
    refused(fresh, tmp_path / "out", message)
    assert not (tmp_path / "made").exists(), "code in a checkpoint was executed"


def test_a_shard_of_another_run(written, fresh, tmp_path):
    (other,) = [path for path in (written.folder / "lora").iterdir() if path.is_dir()]
    (fresh / SECOND).write_bytes((other / SECOND).read_bytes())
    refused(fresh, tmp_path / "out", f"{SECOND} (was changed|has|is truncated)")
    seal(fresh)
    refused(fresh, tmp_path / "out", "_optim_states.pt holds .* of another rank or another run")


@mark.parametrize(
    ("world", "ep", "message"),
    [
        (3, 2, "ep_size 2 does not divide 3 ranks and 4 experts; ep_size can be 1"),
        (8, 8, "ep_size 8 does not divide 8 ranks and 4 experts; ep_size can be 1, 2, 4"),
        (0, 1, "ep_size 1 does not divide 0 ranks .* take 1 or more ranks"),
        (2, 0, "ep_size 0 does not divide 2 ranks"),
        (10**9, 1, "1000000000 ranks are more than the 65536"),
        (2**70, 2**70, f"{2**70} ranks are more than the 65536"),
        (4, 10**12, "ep_size 1000000000000 does not divide 4 ranks and 4 experts"),
        (16, 1, "16 ranks do not divide the global batch of 8 sequences"),
    ],
)
def test_layouts_that_do_not_divide(fresh, tmp_path, world, ep, message):
    refused(fresh, tmp_path / "out", message, world, ep)


def test_a_dense_run_has_no_experts_to_spread(written, tmp_path):
    refused(written.copy("dense", tmp_path / "in"), tmp_path / "out", "ep_size 2 does not divide 2 ranks and 1", 2, 2)


def test_folders_that_are_taken(fresh, tmp_path):
    refused_here = digest(fresh.parent)
    with raises(CheckpointError, match=f"{fresh} is there already"):
        reshape(fresh, fresh.parent, 4, 4)
    reshape(fresh, tmp_path / "out", 4, 4)
    with raises(CheckpointError, match="is there already"):
        reshape(fresh, tmp_path / "out", 2, 1)
    (tmp_path / "out" / fresh.name).rename(tmp_path / "out" / "other")
    (tmp_path / "out" / "latest").write_text("other")
    with raises(CheckpointError, match="holds other checkpoints already"):
        reshape(fresh, tmp_path / "out", 2, 1)
    with raises(CheckpointError, match="is not a folder"):
        reshape(tmp_path / "nowhere", tmp_path / "out2", 2, 1)
    assert digest(fresh.parent) == refused_here


def test_too_little_room(fresh, tmp_path, monkeypatch: MonkeyPatch):
    monkeypatch.setattr(place.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_100_000))
    refused(fresh, tmp_path / "out", r"needs \d MB and 1 MB are free there. Nothing was written")


def test_a_disk_that_fills_up(fresh, tmp_path):
    """As the kernel does it: no file may grow over 20 KiB."""
    before = digest(fresh.parent)
    command = f'ulimit -f 20; exec "{sys.executable}" "{TOOL}" "{fresh}" "{tmp_path / "out"}" --world-size 2'
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "could not save the checkpoint" in ended.stderr
    assert not (tmp_path / "out").exists() and digest(fresh.parent) == before


def test_another_precision(fresh):
    written = SavedCheckpoint(fresh, require_whole(fresh))
    written.require_precision(True)
    with raises(CheckpointError, match="written with bf16.enabled = true, the run has false"):
        written.require_precision(False)


def test_ranks_that_are_new_draw_the_same_whenever_they_are_made(fresh, tmp_path):
    for name in ("one", "two"):
        reshape(fresh, tmp_path / name, 4, 1)
    drawn = [
        torch.load(tmp_path / name / fresh.name / RANDOM_FILE.format(rank=rank), weights_only=True)["torch"]
        for name in ("one", "two")
        for rank in range(4)
    ]
    assert all(torch.equal(one, other) for one, other in zip(drawn[:4], drawn[4:], strict=True))
    assert len({bytes(state.numpy().tobytes()) for state in drawn}) == 3, "the first two are those of the source"


def test_the_command_line(fresh, tmp_path):
    command = [sys.executable, TOOL, fresh.parent / fresh.name, tmp_path / "out", "--world-size", "4", "--json"]
    ended = subprocess.run([*map(str, command), "--ep-size", "2"], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    facts = json.loads(ended.stdout)
    assert facts["before"] == "2 ranks with ep_size 2" and facts["after"] == "4 ranks with ep_size 2"
    assert facts["files"] == len(require_whole(tmp_path / "out" / fresh.name).files) == 19


def large(folder: Path, count: int, numel: int) -> None:
    """A dense run's checkpoint of two ranks: ``count`` parameters of ``numel`` elements, each a group, in fp32."""
    folder.mkdir(parents=True)
    names = [f"layers.{i}.weight" for i in range(count)]
    weights = {name: torch.full((numel,), float(i)) for i, name in enumerate(names)}
    config: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    facts = {"global_steps": 3, "global_samples": 36, "dp_world_size": 2, "mp_world_size": 1, "ds_config": config}
    torch.save({"module": weights, "param_shapes": [], "lr_scheduler": None, **facts}, folder / MODEL_FILE)
    half = numel // 2
    address = {"object of class": "fragment_address", "fields": {"numel": half, "start": 0}}
    for rank in range(2):
        parts = [torch.full((half,), i + rank / 2) for i in range(count)]
        moments = {
            i: {"step": torch.tensor(3.0), "exp_avg": part + 0.1, "exp_avg_sq": part + 0.2}
            for i, part in enumerate(parts)
        }
        state = {
            "base_optimizer_state": {
                "state": moments,
                "param_groups": [{"lr": 1.0, "params": [i]} for i in range(count)],
            },
            "single_partition_of_fp32_groups": parts,
            "zero_stage": 2,
            "group_paddings": [0] * count,
            "param_alignment_paddings": [[0]] * count,
            "partition_count": [2] * count,
            "param_slice_mappings": [{name: address} for name in names],
        }
        torch.save({"optimizer_state_dict": state}, folder / OPTIMIZER_FILE.format(precision="", rank=rank))
        torch.save({}, folder / RANDOM_FILE.format(rank=rank))
    sign(folder, ranks=2)


MEASURE = """
import resource, sys
from mocte_ds.checkpoints.reshaping.reshape import reshape
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
reshape(sys.argv[1], sys.argv[2], 2, 1)
before = peak()
reshape(sys.argv[3], sys.argv[4], 3, 1)
print(peak() - before)
"""


def test_memory_is_that_of_some_tensors(tmp_path):
    numel = 3 << 20  # 12 MiB each; 96 MiB of weights, 288 MiB of masters and moments
    large(tmp_path / "tiny" / "a", 1, 12)
    large(tmp_path / "large" / "a", 8, numel)
    paths = [tmp_path / name for name in ("tiny/a", "out1", "large/a", "out2")]
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)], capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 4 * 4 * numel, f"{int(ended.stdout) / 1e6:.0f} MB"
    for rank in range(3):
        path = tmp_path / "out2" / "a" / OPTIMIZER_FILE.format(precision="", rank=rank)
        state = torch.load(path, weights_only=True, mmap=True)["optimizer_state_dict"]
        for i, master in enumerate(state["single_partition_of_fp32_groups"]):
            place = torch.arange(rank * (numel // 3), (rank + 1) * (numel // 3))
            assert torch.equal(master, i + (place >= numel // 2).float() / 2)
            found = state["base_optimizer_state"]["state"][i]
            assert torch.equal(found["exp_avg"], master + 0.1) and torch.equal(found["exp_avg_sq"], master + 0.2)
