"""Prepared data in clusters: every training document once, validation as it was, refusals."""

from pathlib import Path

import numpy as np
import pytest

from mocte_ds.btm.partition import partition, read_space
from mocte_ds.data import BlendedLoader, Manifest, validation_batches
from mocte_ds.data.manifest import open_indexed
from mocte_ds.errors import CheckpointError, DataError, NotOurs
from tests.btm.conftest import CONTEXT, SOURCES
from tools import btm


def documents(folder: Path, split: str = "train") -> dict[str, list[tuple[int, ...]]]:
    manifest = Manifest.read(folder)
    found = {}
    for domain in manifest.domains:
        if manifest.domains[domain][split]["documents"]:
            data = open_indexed(folder, manifest, domain, split, "all")
            found[domain] = [tuple(data.get(n).tolist()) for n in range(len(data))]
    return found


def test_every_document_is_in_one_cluster_with_its_kind(prepared: Path, tmp_path: Path) -> None:
    facts = partition(prepared, tmp_path / "out", SOURCES, rank=8)
    before, after = documents(prepared), documents(tmp_path / "out")
    assert sorted(after) == [f"cluster{k}" for k in range(SOURCES)]
    assert sorted(sum(after.values(), [])) == sorted(sum(before.values(), []))
    tokens = np.array([facts[name]["tokens"] for name in after])
    assert tokens.sum() == sum(f["train"]["tokens"] for f in Manifest.read(prepared).domains.values())
    assert np.abs(tokens / tokens.mean() - 1).max() < 0.1
    for name, texts in after.items():
        # The first word names the source, so that the first tokens of a cluster's documents are mostly the same.
        firsts = [ids[:2] for ids in texts]
        assert max(firsts.count(first) for first in set(firsts)) > 0.75 * len(firsts), name
        origin = {domain: sum(text in set(before[domain]) for text in texts) for domain in before}
        assert origin == facts[name]["from"] and len(texts) == facts[name]["documents"]
    assert read_space(tmp_path / "out").centres.shape == (SOURCES, 8)


def test_validation_and_training_read_what_they_should(prepared: Path, tmp_path: Path, recwarn) -> None:
    out = tmp_path / "out"
    partition(prepared, out, SOURCES, rank=8)
    assert documents(out, "validation") == documents(prepared, "validation")
    ours, theirs = (validation_batches(folder, CONTEXT, 5) for folder in (out, prepared))
    assert ours.keys() == theirs.keys() == {"first", "second"}
    assert all((ours[d][0] == theirs[d][0]).all() for d in ours)
    assert not [w for w in recwarn if "validated" in str(w.message)]
    loader = BlendedLoader(out, "train", CONTEXT, 8, 0, 1, 8, weights={"cluster2": 1.0})
    mine = " ".join(" ".join(map(str, ids)) for ids in documents(out)["cluster2"])
    batch = next(iter(loader))["input_ids"]
    eod = Manifest.read(prepared).eod_id
    for row in batch.tolist():
        ends = [place for place, number in enumerate(row) if number == eod]
        pieces = [row[a:b] for a, b in zip([0, *(e + 1 for e in ends)], [*ends, len(row)], strict=True)]
        assert all(" ".join(map(str, piece)) in mine for piece in pieces)
    everything = next(iter(BlendedLoader(out, "train", CONTEXT, 64, 0, 1, 64)))["domain"]
    assert sorted(set(everything.tolist())) == [0, 1, 2, 3], "the old domains have nothing to train on"


def test_the_same_twice_and_in_place_of_itself(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["cluster", str(prepared), str(tmp_path / "out"), "--clusters", "4", "--rank", "8"]
    btm.main(words)
    first = Manifest.read(tmp_path / "out").sha256
    btm.main(words)
    assert Manifest.read(tmp_path / "out").sha256 == first
    assert "cluster3" in capsys.readouterr().out


def test_refusals(prepared: Path, tmp_path: Path) -> None:
    for option in ("--clusters", "--rank"):
        with pytest.raises(SystemExit):
            btm.main(["cluster", str(prepared), str(tmp_path / "none"), option, "0"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("the only copy")
    for out in (tmp_path / "mine", prepared, prepared / "below"):
        with pytest.raises(NotOurs):
            partition(prepared, out, SOURCES, rank=8)
    with pytest.raises(DataError, match="more documents"):
        partition(prepared, tmp_path / "out", 500)
    assert not (tmp_path / "out").exists()
    partition(prepared, tmp_path / "out", SOURCES, rank=8)
    with pytest.raises(DataError, match="has a domain cluster0"):
        partition(tmp_path / "out", tmp_path / "again", SOURCES, rank=8)
    with pytest.raises(CheckpointError, match="cluster the data again"):
        read_space(prepared)
