"""What a checkpoint's file may hold: plain values and tensors; nothing that must be executed to be read."""

import enum
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from pytest import mark, raises

from mocte_ds.checkpoints.disk_tensors import read_disk_tensors
from mocte_ds.checkpoints.values import read_plain, size_in_bytes, to_plain
from mocte_ds.dist.mesh import ALONE, mesh_of_processes
from mocte_ds.errors import CheckpointError
from mocte_ds.zero.checkpoint_files import CheckpointFiles, own_files
from tests.checkpoints.damage import plant

MESH = mesh_of_processes()


class Colour(enum.StrEnum):
    RED = "red"


def test_values_become_plain(tmp_path):
    values = {
        "number": np.float64(1.5),
        "count": np.int64(4),
        "flag": np.bool_(True),
        "colour": [Colour.RED],
        "stage": ZeroStageEnum.gradients,
        "history": [(1, 2.5, None, True, b"x", "y")],
        "default": defaultdict(list, {3: [1]}),
        "shape": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "weight": torch.nn.Parameter(torch.ones(2)),
    }
    plain = to_plain(values, "values")
    torch.save(plain, tmp_path / "file.pt")
    back = torch.load(tmp_path / "file.pt", weights_only=True)
    weight = back.pop("weight")
    assert type(weight) is torch.Tensor and not weight.requires_grad and weight.tolist() == [1, 1]
    expected = {
        "number": 1.5,
        "count": 4,
        "flag": True,
        "colour": ["red"],
        "stage": 2,
        "history": values["history"],
        "default": {3: [1]},
        "shape": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
    }
    assert back == expected
    assert [type(back[name]) for name in ("number", "count", "flag", "stage", "default", "shape")] == [
        float,
        int,
        bool,
        int,
        dict,
        torch.Size,
    ]
    assert type(back["colour"][0]) is str


@mark.parametrize(
    ("value", "place"),
    [
        ({"folder": {"path": Path("/x")}}, r"client\['folder'\]\['path'\] holds a pathlib.\w+Path"),
        ([1, (2, lambda: 0)], r"client\[1\]\[1\] holds a builtins.function"),
        ({Path("/x"): 1}, r"a key of client holds a pathlib.\w+Path"),
        ({"rng": np.random.default_rng(0)}, r"client\['rng'\] holds a numpy.random"),
        ({"array": np.zeros(3)}, r"client\['array'\] holds a numpy.ndarray"),
        ({1, 2}, "client holds a builtins.set"),
    ],
)
def test_what_only_pickle_can_store_is_refused_by_place(value, place):
    with raises(CheckpointError, match=place + ".*executing code.*Nothing was written"):
        to_plain(value, "client")


def test_views_and_shared_tensors(tmp_path):
    flat = torch.arange(10_000.0)
    tied = flat[:10]
    plain = to_plain({"a": tied, "b": tied.view(10), "c": flat[10:20], "flat": flat}, "values")
    assert plain["a"] is plain["b"] and torch.equal(plain["c"], flat[10:20])
    assert plain["a"].untyped_storage().nbytes() == 40, "the file would hold the whole buffer"
    assert plain["flat"].data_ptr() == flat.data_ptr(), "no copy where none was asked for"
    assert 40_080 <= size_in_bytes(plain) < 40_500
    torch.save(plain, tmp_path / "file.pt")
    back = torch.load(tmp_path / "file.pt", weights_only=True)
    assert back["a"].data_ptr() == back["b"].data_ptr() and torch.equal(back["flat"], flat)
    copied = to_plain({"flat": flat, "again": flat}, "values", copy=True)
    flat.zero_()
    assert copied["flat"].sum() > 0 and copied["again"] is copied["flat"]


def test_state_dicts_keep_their_versions():
    state = torch.nn.BatchNorm1d(3).state_dict()
    plain = to_plain(state, "module")
    assert type(plain) is OrderedDict and plain._metadata[""]["version"] == state._metadata[""]["version"] == 2


def test_objects_of_deepspeed_come_back(tmp_path):
    scaler = DynamicLossScaler(2.0**16, 1000, 1.0, 2, False, True, torch.half)
    scaler.cur_iter, scaler.cur_scale, scaler.cur_hysteresis = 7, 2.0**15, 1
    files, state = CheckpointFiles(MESH), {"loss_scaler": scaler, "static": LossScaler(8.0)}
    state["param_slice_mappings"] = [OrderedDict(weight=fragment_address(3, 4))]
    files._collected = {}  # as within a save
    files.save({"optimizer_state_dict": state}, str(tmp_path / "zero.pt"))
    assert not (tmp_path / "zero.pt").exists()
    torch.save(files._collected["zero.pt"], tmp_path / "zero.pt")
    assert torch.load(tmp_path / "zero.pt", weights_only=True)
    back = files.load(str(tmp_path / "zero.pt"))["optimizer_state_dict"]
    assert type(back["loss_scaler"]) is DynamicLossScaler and vars(back["loss_scaler"]) == vars(scaler)
    assert back["loss_scaler"].loss_scale == 2.0**15 and type(back["static"]) is LossScaler
    assert back["static"].loss_scale == 8.0
    assert back["param_slice_mappings"][0]["weight"] == fragment_address(3, 4)


def test_objects_of_other_classes_are_not_made(tmp_path):
    content = {"object of class": "Exploit", "fields": {"path": "x"}}
    torch.save({"loss_scaler": dict(content)}, tmp_path / "zero.pt")
    assert CheckpointFiles(MESH).load(str(tmp_path / "zero.pt")) == {"loss_scaler": content}


def test_states_of_a_rank_that_are_not_plain_are_left_out_with_a_warning(recwarn):
    assert own_files(ALONE, {"probe": [torch.ones(2)]})["mocte_random_rank0.pt"]["mocte"]["probe"][0].sum() == 2
    assert not recwarn
    assert "mocte" not in own_files(ALONE, {"probe": {"path": Path("/x")}})["mocte_random_rank0.pt"]
    assert "collects its samples anew" in str(recwarn.pop().message)


@mark.parametrize("as_zip", [True, False])
def test_code_is_not_executed(tmp_path, as_zip):
    path, made = tmp_path / "file.pt", tmp_path / "made"
    plant(path, made, as_zip)
    for read in (read_plain, lambda path: CheckpointFiles(MESH).load(str(path))):
        with raises(CheckpointError, match="file.pt cannot be read: UnpicklingError"):
            read(path)
    assert not made.exists()
    if as_zip:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert made.exists(), "the attack must work where nobody looks"


@mark.parametrize("size", [0, 1, 100, -1])
def test_torn_files(tmp_path, size):
    torch.save({"weights": torch.ones(100)}, tmp_path / "file.pt")
    content = (tmp_path / "file.pt").read_bytes()
    (tmp_path / "file.pt").write_bytes(content[:size])
    with raises(CheckpointError, match="file.pt cannot be read"):
        read_plain(tmp_path / "file.pt")
    with raises(CheckpointError, match="other.pt is missing"):
        read_plain(tmp_path / "other.pt")


def test_files_that_claim_more_than_they_have(tmp_path):
    """Compressed parts, sizes beyond the file, and values that hold each other without end."""
    path = tmp_path / "file.pt"
    torch.save({"a": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as before, zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in before.namelist():
            packed.writestr(name, before.read(name))
    with raises(CheckpointError, match="small.pt cannot be read: .*claims to hold more bytes"):
        read_plain(tmp_path / "small.pt")
    content = path.read_bytes()
    pickled = content.replace(b"M\xe8\x03", b"J\xff\xff\xff\x7f"[:3], 1)
    path.write_bytes(pickled)
    with raises(CheckpointError, match="file.pt"):
        read_disk_tensors(path)
    bomb: list = []
    for _ in range(60):
        bomb = [bomb] * 9
    torch.save({"mocte": bomb}, path)
    with raises(CheckpointError, match="nested too deeply or too often"):
        read_plain(path)
    deep: list = []
    for _ in range(300):
        deep = [deep]
    torch.save(deep, path)
    with raises(CheckpointError, match="nested too deeply or too often"):
        read_plain(path)
    torch.save(torch.zeros(1000), path, _use_new_zipfile_serialization=False)
    with raises(CheckpointError, match="not a file that torch.save writes"):
        read_plain(path)
