"""Files written tensor by tensor: what torch reads of them, and the hash that comes with them; tensors left on disk."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from mocte_ds.checkpoints import disk_tensors
from mocte_ds.checkpoints.disk_tensors import DiskTensor, FileCopy, TensorFile, filled, read_disk_tensors
from mocte_ds.checkpoints.files import HashedBeside, write_file
from mocte_ds.errors import CheckpointError


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor takes several blocks."""
    monkeypatch.setattr(disk_tensors, "_BLOCK", 1000)


def values() -> dict[str, Any]:
    torch.manual_seed(0)
    one = torch.randn(40, 25)
    return {
        "weights": {"a": one, "the same": one, "b": torch.randn(7, 301).bfloat16(), "none": torch.empty(0, 3)},
        "numbers": torch.arange(5),
        "one": torch.tensor(2.5, dtype=torch.float64),
        "step": 7,
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype is other.dtype and one.shape == other.shape and torch.equal(one, other)
    return one == other


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_read_and_written_again(tmp_path: Path, small_blocks: None) -> None:
    torch.save(values(), tmp_path / "plain.pt")
    content = read_disk_tensors(tmp_path / "plain.pt")
    assert isinstance(content["weights"]["a"], DiskTensor) and same(filled(content), values())
    facts = write_file(tmp_path / "again.pt", TensorFile(content))
    found = torch.load(tmp_path / "again.pt", weights_only=True)
    assert same(found, values()), "as torch reads it"
    assert found["weights"]["a"].data_ptr() == found["weights"]["the same"].data_ptr(), "one tensor stays one"
    assert (facts.bytes, facts.sha256) == ((tmp_path / "again.pt").stat().st_size, sha256(tmp_path / "again.pt"))


def test_parts_of_several_files_and_zeros_after_them(tmp_path: Path, small_blocks: None) -> None:
    whole = torch.arange(3000.0)
    for number, part in enumerate(whole.split([1700, 1300])):
        torch.save({"t": part.clone(), "before": torch.ones(number)}, tmp_path / f"{number}.pt")
    parts = [read_disk_tensors(tmp_path / f"{number}.pt")["t"] for number in range(2)]
    made = disk_tensors.join(parts).flat(1500, 2900, 2000)
    wanted = torch.cat([whole[1500:2900], torch.zeros(600)])
    assert torch.equal(made.read(), wanted)
    facts = write_file(tmp_path / "made.pt", TensorFile({"made": made, "held": whole.reshape(30, 100).t()}))
    found = torch.load(tmp_path / "made.pt", weights_only=True)
    assert torch.equal(found["made"], wanted) and torch.equal(found["held"], whole.reshape(30, 100).t())
    assert facts.sha256 == sha256(tmp_path / "made.pt")


def test_a_copy(tmp_path: Path, small_blocks: None) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 30)
    facts = write_file(tmp_path / "copy", FileCopy(tmp_path / "file"))
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "file").read_bytes()
    assert (facts.bytes, facts.sha256) == (7680, sha256(tmp_path / "file"))


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    torch.save({"t": torch.ones(5000)}, tmp_path / "t.pt")
    stored = read_disk_tensors(tmp_path / "t.pt")["t"]
    with open(tmp_path / "t.pt", "r+b") as file:
        file.truncate(9000)
    with pytest.raises(CheckpointError, match="t.pt has become shorter"):
        stored.read()
    with pytest.raises(CheckpointError, match="t.pt has become shorter"):
        write_file(tmp_path / "again.pt", TensorFile({"t": stored}))


def test_where_torch_does_not_say_places_without_fake_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions of torch: places are the same ones."""
    torch.save(values(), tmp_path / "t.pt")
    plain, wanted = disk_tensors.read_plain, read_disk_tensors(tmp_path / "t.pt")

    def forgetful(path: Path, **how: Any) -> Any:
        content = plain(path, **how)
        if how.get("device") == "meta":
            for tensor in disk_tensors._tensors(content):
                tensor.untyped_storage()._checkpoint_offset = None
        return content

    monkeypatch.setattr(disk_tensors, "read_plain", forgetful)
    assert read_disk_tensors(tmp_path / "t.pt") == wanted


def test_hashing_beside_keeps_the_order(tmp_path: Path) -> None:
    pieces = [bytes([number]) * (1 << 16) for number in range(50)]
    with open(tmp_path / "file", "wb") as file:
        hashed = HashedBeside(file)
        for piece in pieces:
            hashed.write(piece)
        facts = hashed.facts()
        hashed.close()
    assert (facts.bytes, facts.sha256) == (50 << 16, hashlib.sha256(b"".join(pieces)).hexdigest())
