"""Bad checkpoints are refused by the names of the files, before anything of them is loaded or written."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from pytest import fixture, mark, raises

from mocte_ds.checkpoints.manifest import require_whole, require_whole_on_ranks
from mocte_ds.checkpoints.names import EXPERT_FILE, MODEL_FILE
from mocte_ds.dist.mesh import ALONE
from mocte_ds.errors import CheckpointError
from mocte_ds.ownership.manifest import MANIFEST_FILE, Manifest
from tests.checkpoints import ranks
from tests.checkpoints.damage import cut, digest, flip, plant, seal, swap
from tests.checkpoints.loaded import load_model
from tests.spawn import spawn

ZERO = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"
EXPERT = EXPERT_FILE.format(layer=1, expert=2)
KINDS = [MODEL_FILE, EXPERT, ZERO.format(0), ZERO.format(1), "mocte_state.pt", "mocte_random_rank1.pt"]
Damage = Callable[[Path], object]


@fixture
def fresh(written, tmp_path) -> Path:
    """A checkpoint to damage."""
    return written.copy("ffn", tmp_path)


def test_the_checkpoints_are_whole_and_plain(written):
    """Every file of every kind of run is in the manifest and readable without executing anything."""
    for name in ("ffn", "lora", "dense"):
        (folder,) = [path for path in (written.folder / name).iterdir() if path.is_dir()]
        manifest = require_whole(folder)
        assert {path.name for path in folder.iterdir()} == {*manifest.files, MANIFEST_FILE}
        weights = [name for name in manifest.files if name.endswith(".pt")]
        for file in weights:
            assert torch.load(folder / file, weights_only=True)
        assert (len(weights), manifest.world_size, len(manifest.run)) == (
            {"ffn": 15, "lora": 11, "dense": 5}[name],
            2,
            32,
        )
        assert (name == "dense") == ("run_identity.json" in manifest.files)


CASES: dict[str, tuple[Damage, str]] = {
    **{
        f"flipped {name} at {place}": (
            lambda folder, name=name, place=place: flip(folder / name, place),
            f"{name} was changed: its sha256 is not that of what was saved",
        )
        for name in KINDS
        for place in (0, 0.5, 1)
    },
    **{
        f"missing {name}": (lambda folder, name=name: (folder / name).unlink(), f"{name} is missing[;.:]")
        for name in (*KINDS, MANIFEST_FILE)
    },
    **{
        f"torn {name} {size}": (
            lambda folder, name=name, size=size: cut(folder / name, size),
            rf"{name} is truncated to \d+ of \d+ bytes",
        )
        for name in KINDS
        for size in (0, 1000, -1)
    },
    "longer": (lambda folder: (folder / EXPERT).open("ab").write(b"x"), rf"{EXPERT} has \d+ bytes, \d+ were saved"),
    "renamed": (
        lambda folder: (folder / EXPERT).rename(folder / "expert.pt"),
        rf"expert.pt does not belong to it; {EXPERT} is missing \(expert.pt holds its content: it was renamed\)",
    ),
    "one too many": (
        lambda folder: shutil.copy(folder / EXPERT, folder / EXPERT_FILE.format(layer=1, expert=9)),
        f"{EXPERT_FILE.format(layer=1, expert=9)} does not belong to it",
    ),
    "shards mixed up": (
        lambda folder: swap(folder / ZERO.format(0), folder / ZERO.format(1)),
        f"{ZERO.format(0)} holds the content of {ZERO.format(1)}: files were mixed up; {ZERO.format(1)} holds",
    ),
    "experts mixed up": (
        lambda folder: swap(folder / EXPERT, folder / EXPERT_FILE.format(layer=0, expert=0)),
        f"{EXPERT} holds the content of {EXPERT_FILE.format(layer=0, expert=0)}: files were mixed up",
    ),
    "manifest of nothing": (
        lambda folder: (folder / MANIFEST_FILE).write_text("[]"),
        f"{MANIFEST_FILE} cannot be read",
    ),
    "folder for a file": (
        lambda folder: ((folder / EXPERT).unlink(), (folder / EXPERT).mkdir()),
        f"{EXPERT} (is truncated|has|cannot be read|was changed)",
    ),
    "format of the future": (
        lambda folder: edit_manifest(folder, format=99),
        "manifest.json has format 99; this version reads format 2",
    ),
    "another step": (lambda folder: edit_manifest(folder, step=7), f"{MANIFEST_FILE} was changed after it was written"),
    "no files": (lambda folder: edit_manifest(folder, files=None), f"{MANIFEST_FILE} cannot be read"),
}


def edit_manifest(folder: Path, **changes: object) -> None:
    values = json.loads((folder / MANIFEST_FILE).read_text())
    (folder / MANIFEST_FILE).write_text(json.dumps({**values, **changes}, indent=1) + "\n")


@mark.parametrize("case", CASES)
def test_damage_is_refused_by_name(fresh, case):
    damage, message = CASES[case]
    require_whole(fresh)
    damage(fresh)
    before = digest(fresh.parent)
    for check in (require_whole, lambda folder: require_whole_on_ranks(folder, ALONE)):
        with raises(CheckpointError, match=message):
            check(fresh)
    assert digest(fresh.parent) == before


def test_any_bit_of_the_manifest(fresh):
    content, generator = (fresh / MANIFEST_FILE).read_bytes(), random.Random(5)
    for _ in range(300):
        changed = bytearray(content)
        changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        (fresh / MANIFEST_FILE).write_bytes(changed)
        with raises(CheckpointError, match=MANIFEST_FILE):
            Manifest.read(fresh)


def test_files_of_another_checkpoint_and_of_another_run(fresh, written):
    other = shutil.copytree(fresh, fresh.parent / "step99")
    flip(other / EXPERT, 0.4)
    seal(other)
    shutil.copy(other / EXPERT, fresh / EXPERT)
    with raises(CheckpointError, match=f"{EXPERT} holds the content of {EXPERT} of the checkpoint step99: files were"):
        require_whole(fresh)
    (lora,) = [path for path in (written.folder / "lora").iterdir() if path.is_dir()]
    shutil.copy(lora / ZERO.format(1), fresh / EXPERT)
    with raises(CheckpointError, match=f"{EXPERT} (has|is truncated|was changed)"):
        require_whole(fresh)
    shutil.copy(lora / MANIFEST_FILE, fresh / MANIFEST_FILE)
    with raises(CheckpointError, match=f"damaged: {EXPERT_FILE.format(layer=1, expert=0)} does not belong to it"):
        require_whole(fresh)


def test_sizes_alone(fresh):
    flip(fresh / EXPERT, 0.4)
    assert require_whole_on_ranks(fresh, ALONE, content=False).files
    cut(fresh / EXPERT, -1)
    with raises(CheckpointError, match="truncated"):
        require_whole_on_ranks(fresh, ALONE, content=False)


def test_readers_of_the_model_look_at_the_files_that_they_read(fresh):
    flip(fresh / ZERO.format(0), 0.5)
    load_model(fresh)  # the optimizer is none of its business
    for name in (MODEL_FILE, EXPERT, "mocte_state.pt"):
        content = (fresh / name).read_bytes()
        flip(fresh / name, 0.9)
        with raises(CheckpointError, match=f"damaged: {name} was changed"):
            load_model(fresh.parent / fresh.name)
        (fresh / name).write_bytes(content)
    (fresh / MANIFEST_FILE).unlink()
    with raises(CheckpointError, match="manifest.json is missing: .* is not a whole checkpoint of this version"):
        load_model(fresh)


def test_two_ranks_refuse_with_the_same_words_and_load_nothing(written, tmp_path):
    names = [case for case in CASES if re.search("at 0.5|missing|renamed|mixed|longer|another step|torn .* 1000", case)]
    folders = []
    for number, case in enumerate(names):
        folder = written.copy("ffn", tmp_path / str(number))
        CASES[case][0](folder)
        folders.append(str(folder))
    before = digest(tmp_path)
    (good,) = [path for path in (written.folder / "ffn").iterdir() if path.is_dir()]
    first, second = spawn(ranks.load_each, 2, str(good), folders, timeout=150, deepspeed=True)
    assert first == second and len(first) == len(names)
    for case, error in zip(names, first, strict=True):
        assert re.search(CASES[case][1], error), f"{case}: {error}"
        assert "CHANGED" not in error
    assert digest(tmp_path) == before


def test_dense_runs_refuse_too(written, tmp_path):
    folders = [written.copy("dense", tmp_path / name) for name in ("flipped", "swapped", "code", "sealed", "good")]
    flip(folders[0] / ZERO.format(1), 0.5)
    swap(folders[1] / ZERO.format(0), folders[1] / ZERO.format(1))
    for rank in range(2):
        plant(folders[2] / ZERO.format(rank), tmp_path / "made")
    swap(folders[3] / ZERO.format(0), folders[3] / ZERO.format(1))
    for folder in folders[2:4]:
        seal(folder)
    for rank, errors in enumerate(spawn(ranks.load_dense, 2, list(map(str, folders)), timeout=120, deepspeed=True)):
        assert f"{ZERO.format(1)} was changed" in errors[0]
        assert f"{ZERO.format(0)} holds the content of {ZERO.format(1)}" in errors[1]
        assert f"{ZERO.format(rank)} cannot be read: UnpicklingError" in errors[2]
        assert re.search(rf"{ZERO.format(rank)} has model\.\S+ elsewhere than this run's optimizer", errors[3])
        assert errors[4] == "loaded step 3, 768 tokens"
    assert not (tmp_path / "made").exists()


def test_code_in_a_checkpoint_is_not_executed(written, tmp_path):
    """Also where the manifest was made to agree: it guards against accidents, and weights_only against attacks."""
    patterns = ["mp_rank_", "layer_", "bf16_zero_", "mocte_state", "mocte_random_"]
    folders, made = [], tmp_path / "made"
    for pattern in patterns:
        folder = written.copy("ffn", tmp_path / pattern)
        for path in folder.glob(f"{pattern}*"):
            plant(path, made)
        with raises(CheckpointError, match="was changed|bytes"):
            require_whole(folder)
        seal(folder)
        folders.append(str(folder))
    for errors in spawn(ranks.load_code, 2, folders, timeout=150, deepspeed=True):
        for pattern, error in zip(patterns, errors, strict=True):
            assert re.search(rf"{pattern}.*\.pt cannot be read: UnpicklingError", error), error
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists(), "the attack must work where nobody looks"


def test_a_newer_version_is_refused_by_the_key_that_is_not_known(fresh):
    path = fresh / "mocte_state.pt"
    state = torch.load(path, weights_only=True)
    state["mocte"]["config"]["router"]["temperature"] = 0.5
    torch.save(state, path)
    seal(fresh)
    with raises(CheckpointError, match="was written by another version of mocte_ds: .*mocte.router.temperature"):
        load_model(fresh)
