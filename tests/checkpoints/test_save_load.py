"""Saving moves `latest` last; loading refuses torn, foreign and other configurations' files, and executes nothing."""

import os
import pickle
import random
import re
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
from pytest import fixture, mark, raises

from mocte_ds.checkpoints.load import read_plain, read_state, resolve_tag, restore_random_states
from mocte_ds.checkpoints.save import finish_checkpoint, is_plain, prepare_checkpoint, random_states
from mocte_ds.config import MocteConfig
from mocte_ds.errors import CheckpointError
from tests.checkpoints import ranks
from tests.spawn import spawn

CONFIG = MocteConfig.from_dict({"modules": "model.layers.*.mlp", "num_experts": 4, "ep_size": 2})
NAMES = ["model.layers.0.mlp", "model.layers.1.mlp"]
STATE = {"config": CONFIG.to_dict(), "blocks": [{"name": name, "mode": "warmup"} for name in NAMES], "tokens": 12}


@fixture
def saved(tmp_path) -> Path:
    """A folder with the checkpoint `one` of a single process."""
    (tmp_path / "one").mkdir()
    finish_checkpoint(tmp_path, "one", STATE, {"note": [1, {"basis": torch.arange(3.0)}]}, True)
    return tmp_path


def test_two_ranks(tmp_path):
    first, second = spawn(ranks.save_and_fail, 2, str(tmp_path), timeout=90)
    for result in (first, second):
        assert result["after good"] == "good"
        assert re.search(r"could not save .*blocked: .*last good checkpoint \(good\) is untouched", result["error"])
        assert result["after blocked"] == "good"
        assert result["after late"] == result["after aside"] == "late"
        assert result["again"] == result["drawn"]
    assert second["while rank 1 writes"] == "good", "`latest` moved before all ranks had written"
    assert first["drawn"] != second["drawn"]
    assert not (tmp_path / "latest.tmp").exists()


def test_what_was_saved_comes_back(saved):
    assert resolve_tag(saved) == "one"
    state = read_state(saved, "one", CONFIG, NAMES)
    assert state["mocte"] == STATE and state["client_state"]["note"][0] == 1
    assert torch.equal(state["client_state"]["note"][1]["basis"], torch.arange(3.0))
    assert read_state(saved, "one", None, None)["mocte"]["tokens"] == 12


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
    (saved / "latest").write_bytes(b"one\n")
    assert resolve_tag(saved) == "one"


@mark.parametrize("size", [0, 1, 100, -1])
def test_torn_files(saved, size):
    for name in ("mocte_state.pt", "mocte_random_rank0.pt"):
        path = saved / "one" / name
        path.write_bytes(path.read_bytes()[:size])
        with raises(CheckpointError, match=f"{name} cannot be read"):
            read_state(saved, "one", CONFIG, NAMES) if "state" in name else restore_random_states(saved, "one")


def test_missing_and_foreign_files(saved):
    path = saved / "one" / "mocte_state.pt"
    for content, message in (
        ({"format": 2}, "has format 2; this version reads format 1"),
        ({"weights": 1}, "mocte_state.pt has no format"),
        ([1, 2], "mocte_state.pt has no keys"),
        (torch.zeros(2), "mocte_state.pt has no keys"),
        ({"format": 1}, "has no mocte, client_state"),
        ({"format": 1, "mocte": {"blocks": []}, "client_state": {}}, "has no config, tokens"),
        ({"format": 1, "mocte": None, "client_state": {}}, "has no keys"),
    ):
        torch.save(content, path)
        with raises(CheckpointError, match=message):
            read_state(saved, "one", CONFIG, NAMES)
    path.unlink()
    with raises(
        CheckpointError, match="mocte_state.pt is missing: the checkpoint is incomplete or not one of mocte_ds"
    ):
        read_state(saved, "one", CONFIG, NAMES)
    torch.save({"python": 1}, saved / "one" / "mocte_random_rank0.pt")
    with raises(CheckpointError, match="mocte_random_rank0.pt has no numpy, torch"):
        restore_random_states(saved, "one")


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
            ["router.kind: checkpoint 'token'", "rank: checkpoint 8"],
        ),
        ({"freeze": {"alpha": 0.3}, "clusters": {"deadline": 0.5}, "check_every": 0.1, "seed": 4}, []),
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


class Exploit:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@mark.parametrize("as_zip", [True, False])
def test_code_is_not_executed(saved, as_zip):
    attack, made = {"format": 1, "mocte": Exploit(saved / "made")}, saved / "made"
    for name in ("mocte_state.pt", "mocte_random_rank0.pt"):
        path = saved / "one" / name
        if as_zip:
            torch.save(attack, path)
        else:
            path.write_bytes(pickle.dumps(attack, protocol=2))
        with raises(CheckpointError, match=f"{name} cannot be read: UnpicklingError"):
            read_plain(path)
        with raises(CheckpointError, match="cannot be read"):
            read_state(saved, "one", CONFIG, NAMES) if "state" in name else restore_random_states(saved, "one")
        assert not made.exists()
    pickle.loads(pickle.dumps(attack))
    assert made.exists(), "the attack must work where nobody looks"


class Colour(StrEnum):
    RED = "red"


def test_client_states_that_only_pickle_can_read(saved):
    """They must not make our own file unreadable; DeepSpeed's files hold them."""
    client = {
        "tokens": 3,
        "loss": np.float64(1.5),
        "colour": [Colour.RED],
        "folder": {"path": saved},
        "history": [(1, 2.5, None, True, b"x", "y")],
        "weight": torch.nn.Parameter(torch.ones(2)),
    }
    (saved / "two").mkdir()
    finish_checkpoint(saved, "two", STATE, client, True)
    assert read_state(saved, "two", CONFIG, NAMES)["client_state"] == {k: client[k] for k in ("tokens", "history")}
    assert not is_plain({Colour.RED: 1}) and is_plain({1: {"a": [torch.ones(1)]}})
    torch.save({"value": np.float64(1.5)}, saved / "foreign.pt")
    with raises(CheckpointError):  # the reason for all this
        read_plain(saved / "foreign.pt")


def test_failing_writes_say_what_is_intact(saved):
    with raises(
        CheckpointError, match=r"could not save .*/three: no space \(\d+ MB are free there\).*\(one\) is untouched"
    ):
        with prepare_checkpoint(saved, "three"):
            raise OSError("no space")
    with raises(CheckpointError, match="saved over the checkpoint that .*latest names, which may be damaged"):
        with prepare_checkpoint(saved, "one"):
            raise RuntimeError("PytorchStreamWriter failed writing file")
    with raises(CheckpointError, match=r"last good checkpoint \(none\)"):
        with prepare_checkpoint(saved / "new", "one"):
            raise OSError("no space")
    with raises(CheckpointError, match=r"could not save .*/missing: .*\(one\) is untouched"):
        finish_checkpoint(saved, "missing", STATE, {}, True)
    assert resolve_tag(saved) == "one"
    with raises(KeyError), prepare_checkpoint(saved, "three"):
        raise KeyError("a defect keeps its own error")


def test_random_states_are_restored_and_plain(saved):
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    ranks.draw()
    assert is_plain(random_states())
    finish_checkpoint(saved, "one", STATE, {}, True)
    drawn = [ranks.draw(), ranks.draw()]
    assert drawn[0] != drawn[1]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    restore_random_states(saved, "one")
    assert [ranks.draw(), ranks.draw()] == drawn
    (saved / "one" / "mocte_random_rank0.pt").unlink()
    restore_random_states(saved, "one")  # a rank that did not exist keeps its own numbers
