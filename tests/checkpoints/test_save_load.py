"""Saving takes a checkpoint's name last; what was there before stays whole; our part fits its run or is refused."""

import hashlib
import json
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from pytest import fixture, mark, raises

from mocte_ds.checkpoints import place
from mocte_ds.checkpoints.load import STATE_FILE, read_state
from mocte_ds.checkpoints.manifest import require_whole
from mocte_ds.checkpoints.place import Place, find_checkpoint, find_tag, remove_leftovers, resolve_tag
from mocte_ds.checkpoints.random_states import RANDOM_FILE, random_states, restore_random_states
from mocte_ds.checkpoints.save import Saver, _Save
from mocte_ds.config import MocteConfig
from mocte_ds.dist.mesh import ALONE, mesh_of_processes
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.ownership.facts import FileFacts
from mocte_ds.ownership.manifest import MANIFEST_FILE, Manifest
from mocte_ds.zero.checkpoint_files import use_checkpoint_files
from tests.checkpoints import ranks
from tests.checkpoints.damage import digest, seal, swap
from tests.ownership.trees import tree
from tests.spawn import spawn

MESH = mesh_of_processes()

CONFIG = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "num_experts": 4, "ep_size": 2})
NAMES = ["model.layers.0.mlp", "model.layers.1.mlp"]
STATE = {"config": CONFIG.to_dict(), "blocks": [{"name": name, "mode": "warmup"} for name in NAMES], "tokens": 12}
CLIENT = {"note": [1, {"basis": torch.arange(3.0)}]}


def save(root: Path, tag: str, step: int = 3, **more) -> Path:
    files = {STATE_FILE: {"mocte": STATE, "client_state": CLIENT}, RANDOM_FILE.format(rank=0): random_states()}
    Saver(ALONE).save(root, tag, {**files, "small.json": b"{}"}, step, **more)
    return root / tag


@fixture
def saved(tmp_path) -> Path:
    """A folder with the checkpoint `one` of a single process."""
    save(tmp_path, "one")
    return tmp_path


def test_two_ranks(tmp_path):
    first, second = spawn(ranks.save_and_fail, 2, str(tmp_path), timeout=90)
    for result in (first, second):
        assert result["after good"] == "good"
        error = result["errors"]["blocked"]
        assert re.search(r"could not save .*blocked: OSError: .*File name too long.*\(good\) is untouched", error)
        assert result["after errors"] == "good" and result["there after errors"] == ["good", "latest"]
        assert result["while rank 1 writes"] == ("late", False), "visible before all ranks had written"
        assert result["after late"] == "late" and result["after beside"] == result["after aside"] == "beside"
        assert result["again"] == result["drawn"]
    assert first["run"] == second["run"] and first["drawn"] != second["drawn"]
    assert "lambda" in second["errors"]["defect"] and "CheckpointError" not in second["errors"]["defect"]
    assert first["errors"]["defect"].startswith("CheckpointError: could not save")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside", "beside", "good", "late", "latest"]
    manifest = json.loads((tmp_path / "good" / MANIFEST_FILE).read_text())
    assert (manifest["format"], manifest["step"], manifest["world_size"]) == (2, 5, 2)
    files = {path.name: path.read_bytes() for path in (tmp_path / "good").iterdir() if path.name != MANIFEST_FILE}
    assert manifest["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    assert set(files) == {"own0", "own1", "mocte_random_rank0.pt", "mocte_random_rank1.pt"}


def test_a_slow_disk_does_not_run_into_the_time_out_of_an_exchange(tmp_path: Path) -> None:
    assert spawn(ranks.slow_writer, 2, str(tmp_path), timeout=90) == ["slow", "slow"]


def test_errors_of_asynchronous_saves_reach_all_ranks(tmp_path):
    for heard in spawn(ranks.fail_beside, 2, str(tmp_path), timeout=90):
        assert set(heard) == {"at_the_next_step", "at_the_next_save", "wait"}
        assert all(re.search(r"could not save .*beside: OSError: .*too long", text) for text in heard.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "latest"]


def test_asynchronous_save_holds_the_moment_of_the_call(tmp_path):
    for rank, result in enumerate(spawn(ranks.change_while_saving, 2, str(tmp_path), timeout=150, deepspeed=True)):
        assert (tmp_path / f"seen{rank}").read_text() == "False\n", "`latest` moved before the files were written"
        assert all(map(np.array_equal, result["before"], result["after"]))
        assert sum(not np.array_equal(*pair) for pair in zip(result["before"], result["trained"], strict=True)) > 20
        assert result["client"]["number"] == 1.5 and type(result["client"]["number"]) is float
        assert torch.equal(result["client"]["tensor"], torch.ones(3))


def test_values_that_are_not_plain_are_refused_on_all_ranks(tmp_path):
    for client, optimizer in spawn(ranks.save_what_is_not_plain, 2, str(tmp_path), timeout=90, deepspeed=True):
        assert re.search(r"client_state\['folder'\] holds a pathlib.\w+Path", client)
        assert re.search(r"zero_pp_rank_1_.*\['clip_grad'\] holds a pathlib.\w+Path.*Nothing was written", optimizer)
    assert not list(tmp_path.iterdir())


@mark.parametrize(
    ("changes", "message"),
    [
        ({"writer": {"type": "FAST"}}, "checkpoint.writer"),
        ({"local": True}, "use_node_local_storage is not supported: .* file system that all hosts share"),
        ({"universal": True}, "load_universal is not supported"),
    ],
)
def test_settings_of_deepspeed_that_go_round_it(changes, message):
    config = SimpleNamespace(
        checkpoint_config={"writer": changes.get("writer")}, datastates_config=SimpleNamespace(enabled=False)
    )
    engine = SimpleNamespace(
        _config=config,
        use_node_local_storage=lambda: "local" in changes,
        load_universal_checkpoint=lambda: "universal" in changes,
    )
    with raises(ConfigError, match=message):
        use_checkpoint_files(engine, MESH)


def test_what_was_saved_comes_back(saved):
    assert resolve_tag(saved) == "one"
    state = read_state(saved, "one", CONFIG, NAMES)
    assert state["mocte"] == STATE and state["client_state"]["note"][0] == 1
    assert torch.equal(state["client_state"]["note"][1]["basis"], torch.arange(3.0))
    assert read_state(saved, "one", None, None)["mocte"]["tokens"] == 12
    assert require_whole(saved / "one").step == 3


def test_latest(saved):
    assert resolve_tag(saved / "nowhere") is None and resolve_tag(saved / "one") is None
    for content, message in (
        (b"", "names the checkpoint ''"),
        (b"  \n", "names the checkpoint ''"),
        (b"two", "names the checkpoint 'two', which is not there; write another tag"),
        (b"\xff\xfe\x00", "latest cannot be read"),
    ):
        (saved / "latest").write_bytes(content)
        with raises(CheckpointError, match=message):
            resolve_tag(saved)
    (saved / "one" / "two").mkdir()
    for tag in ("x" * 5000, "one/two", "..", ".", "/tmp", "a\0b"):
        (saved / "latest").write_text(tag)
        with raises(CheckpointError, match="names the checkpoint .* is not there") as caught:
            resolve_tag(saved)
        assert len(str(caught.value)) < 500
    (saved / "latest").write_bytes(b"one\n")
    assert resolve_tag(saved) == "one"
    assert resolve_tag(saved / ("x" * 5000)) is None
    with raises(CheckpointError, match="is not a folder"):
        find_tag(saved / ("x" * 5000))


def test_a_manifest_under_another_name(saved):
    swap(saved / "one" / MANIFEST_FILE, saved / "one" / STATE_FILE)
    with raises(
        CheckpointError, match=f"{MANIFEST_FILE} cannot be read: .*{STATE_FILE} holds a manifest: files were mixed"
    ):
        require_whole(saved / "one")


@mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": 10**9}, "world_size is 1000000000, with 3 files"),
        ({"world_size": 0}, "world_size 0"),
        ({"world_size": True}, "world_size True"),
        ({"step": -1}, "step -1"),
        ({"step": 2**70}, "step 118"),
        ({"run": None}, "run None"),
        ({"name": "../one"}, "'../one' is not the name of a file"),
        ({"name": ".."}, "is not the name of a file"),
        ({"name": "a\0b"}, "is not the name of a file"),
        ({"name": "\ud800"}, "is not the name of a file"),
        ({"bytes": "8"}, "how long small.json is"),
    ],
)
def test_manifests_that_claim_the_impossible(saved, changes, message):
    """With a checksum that agrees, as somebody who tampers would write it."""
    old = Manifest.read(saved / "one")
    files = dict(old.files)
    if "name" in changes:
        files[changes.pop("name")] = files["small.json"]
    if "bytes" in changes:
        files["small.json"] = FileFacts(changes.pop("bytes"), "0")
    Manifest(**{"run": old.run, "step": old.step, "world_size": 1, "files": files, **changes}).write(saved / "one")
    with raises(CheckpointError, match=f"was changed after it was written.*{message}"):
        Manifest.read(saved / "one")


def test_a_manifest_nested_too_deeply(saved):
    (saved / "one" / MANIFEST_FILE).write_text("[" * 200_000)
    with raises(CheckpointError, match="cannot be read: .*RecursionError"):
        Manifest.read(saved / "one")


def test_a_tag_is_replaced_whole(saved):
    before = Manifest.read(saved / "one")
    save(saved, "one", 4)
    after = require_whole(saved / "one")
    assert after.step == 4 and after.run != before.run
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "one"]


def test_killed_while_a_tag_is_replaced(saved, monkeypatch):
    """Between the two renames the old checkpoint is still the one that is found; the next save gives its name back."""

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    here = Place(saved, "one")
    here.prepare(0)
    os.close(here._held.pop())  # as the end of its process does
    with monkeypatch.context() as patch:
        rename = place.os.rename
        patch.setattr(place.os, "rename", lambda a, b: kill() if Path(a) == here.partial else rename(a, b))
        with raises(Killed):
            here.swap_in()
    assert not (saved / "one").exists()
    found = saved / resolve_tag(saved)
    assert require_whole(found).step == 3 and read_state(saved, found.name, CONFIG, NAMES)
    save(saved, "two", 5, save_latest=False)
    assert resolve_tag(saved) == "one" and require_whole(saved / "one").step == 3
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "one", "two"]


def test_a_save_under_way_is_no_leftover(saved):
    """Another save, of this process or another one, neither removes it nor writes into it."""
    one, two = Place(saved, "three"), Place(saved, "two")
    one.prepare(0)
    (one.partial / "file").write_text("half")
    two.prepare(0)
    with raises(CheckpointError, match="another save writes it at this moment"):
        Place(saved, "three").prepare(0)
    assert (one.partial / "file").read_text() == "half"
    one.give_up()
    two.give_up()
    assert not list(saved.glob(".*"))


def test_only_our_leftovers_are_removed(saved):
    """A save that was killed has left its mark, or a whole checkpoint; a name alone shows nothing."""
    killed = Place(saved, "two")
    killed.prepare(0)
    os.close(killed._held.pop())  # as the end of its process does
    (saved / ".two.mocte-partial" / "file").write_text("half")
    shutil.copytree(saved / "one", saved / ".one.mocte-replaced")
    for name in (".three.mocte-partial", ".four.mocte-replaced", ".two.partial", "mocte-partial", ".mine"):
        (saved / name).mkdir()
        (saved / name / "file").write_text("x")
    shutil.copytree(saved / "one", saved / "four")
    shutil.copytree(saved / "one", saved / ".five.mocte-partial")
    (saved / ".five.mocte-partial" / "notes").write_text("x")
    (saved / ".file.mocte-partial").write_text("no folder")
    before = tree(saved)
    remove_leftovers(saved)
    ours = (".two.mocte-partial", ".one.mocte-replaced")
    assert tree(saved) == {name: what for name, what in before.items() if name.split("/")[0] not in ours}
    assert find_checkpoint(saved, "") is None and find_checkpoint(saved, "two") is None


@mark.parametrize("change", ["more", "changed", "bare", "link", "file"])
def test_a_folder_of_the_user_with_the_name_of_a_checkpoint_stays(saved, change):
    place_ = saved / "two"
    shutil.copytree(saved / "one", place_)
    name = min(path.name for path in place_.iterdir() if path.suffix == ".pt")
    if change == "more":
        (place_ / "notes").write_text("look at expert 3")
    elif change == "changed":
        with open(place_ / name, "r+b") as file:
            file.write(b"mine")
    elif change == "bare":
        (place_ / "mocte_manifest.json").unlink()
    else:
        shutil.rmtree(place_)
        if change == "link":
            place_.symlink_to(saved / "one")
        else:
            place_.write_text("x")
    before = tree(saved)
    with raises(CheckpointError, match="two is there and is not.*Nothing was changed"):
        save(saved, "two", 9)
    assert tree(saved) == before


def test_a_file_of_the_user_called_latest_stays(saved):
    (saved / "latest").write_text("the latest figures:\n3.2 nats\n")
    before = tree(saved)
    with raises(CheckpointError, match="latest is not the name of a checkpoint"):
        save(saved, "two", 9)
    assert tree(saved) == before


def test_too_little_room_is_refused_before_anything_is_written(saved, monkeypatch):
    before = digest(saved)
    monkeypatch.setattr(place.shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000_000))
    # A tensor and a view of it, as in ZeRO's flat buffers: 8 MB each in the file; room for 28.
    files = {"a.pt": {"weights": torch.zeros(2_000_000)}, "b.pt": [torch.zeros(2_000_000)]}
    Saver(ALONE).save(saved, "fits", dict(files), 1, save_latest=False)
    shutil.rmtree(saved / "fits")
    with raises(
        CheckpointError, match=r"it needs 33 MB and 30 MB are free .*Nothing was written.*\(one\) is untouched"
    ):
        Saver(ALONE).save(saved, "two", {**files, "c.bin": bytes(16_000_000)}, 1)
    assert digest(saved) == before and not list(saved.glob(".*"))


def test_the_folder_may_be_renamed_as_soon_as_the_last_part_is_seen(tmp_path, monkeypatch):
    place, replace = Place(tmp_path, "step1"), os.replace
    place.prepare(0)

    def seen_at_once(pending, path):
        replace(pending, path)
        if path.name.startswith(".part_"):
            place.partial.rename(place.final)

    monkeypatch.setattr(os, "replace", seen_at_once)
    part = _Save(place, 1, 2, {"a.bin": b"x"}, "run", 1, True, 2)
    part.run()
    assert part.failure is None and (place.final / "a.bin").read_bytes() == b"x"
    place.settle()


def test_a_rank_that_does_not_see_the_folder(saved, monkeypatch):
    monkeypatch.setattr(place, "_PATIENCE", 0.1)
    with raises(CheckpointError, match="does not see .*mocte-partial.*file system that all hosts share"):
        Place(saved, "two").require_seen()


@mark.parametrize("tag", ["", "a/b", "../one", ".hidden", ".", "one born", "one\n", "\u00a0x", "x" * 250, "bell\a"])
def test_names_of_checkpoints(tmp_path, tag):
    with raises(CheckpointError, match="cannot be named"):
        Saver(ALONE).save(tmp_path / "new", tag, {}, 1)
    assert not (tmp_path / "new").exists()


@mark.parametrize(
    ("changes", "told"),
    [
        ({"num_experts": 8}, ["mocte.num_experts: checkpoint 4, run 8"]),
        ({"ep_size": 4}, ["mocte.ep_size: checkpoint 2, run 4"]),
        (
            {"expert": {"kind": "lora", "width": 3}},
            ["expert.kind: checkpoint 'ffn', run 'lora'", "width: checkpoint None"],
        ),
        (
            {"router": {"kind": "hash"}, "spectrum": {"rank": 6}},
            ["router.kind: checkpoint 'type'", "rank: checkpoint 8"],
        ),
        (
            {
                "freeze": {"alpha": 0.3},
                "clusters": {"deadline": 0.5},
                "check_every": 0.1,
                "seed": 4,
                "checkpoint": {"async_save": True},
            },
            [],
        ),
    ],
)
def test_another_configuration(saved, changes, told):
    run = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "num_experts": 4, "ep_size": 2, **changes})
    if not told:
        assert read_state(saved, "one", run, NAMES)
        return
    with raises(CheckpointError) as caught:
        read_state(saved, "one", run, NAMES)
    assert all(text in str(caught.value) for text in told)
    assert str(caught.value).count("checkpoint ") - 1 == len(told)


def test_other_blocks(saved):
    with raises(
        CheckpointError, match=r"has the blocks \['model.layers.0.mlp', .*the model has \['model.layers.0.mlp'\]"
    ):
        read_state(saved, "one", CONFIG, NAMES[:1])
    with raises(CheckpointError, match="has the blocks"):
        read_state(saved, "one", CONFIG, NAMES[::-1])


def test_foreign_content_of_our_files(saved):
    path = saved / "one" / STATE_FILE
    for content, message in (
        ({"weights": 1}, f"{STATE_FILE} has no mocte, client_state"),
        ([1, 2], f"{STATE_FILE} has no keys"),
        (torch.zeros(2), f"{STATE_FILE} has no keys"),
        ({"mocte": {"blocks": []}, "client_state": {}}, "has no config, tokens"),
        ({"mocte": None, "client_state": {}}, "has no keys"),
    ):
        torch.save(content, path)
        seal(saved / "one")
        with raises(CheckpointError, match=message):
            read_state(saved, "one", CONFIG, NAMES)
    path.unlink()
    with raises(CheckpointError, match=f"{STATE_FILE} is missing: the checkpoint is incomplete or not one of mocte_ds"):
        read_state(saved, "one", CONFIG, NAMES)
    torch.save({"python": 1}, saved / "one" / "mocte_random_rank0.pt")
    with raises(CheckpointError, match="mocte_random_rank0.pt has no numpy, torch"):
        restore_random_states(saved, "one", 0)


def test_random_states_are_restored(tmp_path):
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    ranks.draw()
    save(tmp_path, "one")
    drawn = [ranks.draw(), ranks.draw()]
    assert drawn[0] != drawn[1]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    restore_random_states(tmp_path, "one", 0)
    assert [ranks.draw(), ranks.draw()] == drawn
    (tmp_path / "one" / "mocte_random_rank0.pt").unlink()
    with raises(CheckpointError, match="mocte_random_rank0.pt is missing"):
        restore_random_states(tmp_path, "one", 0)
