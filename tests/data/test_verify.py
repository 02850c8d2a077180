"""Flipped bits in prepared data are found, and so is what a manifest claims and the files do not hold."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from mocte_ds.data import BlendedLoader, Manifest, prepare, verify
from mocte_ds.data.loader import PackedDomain
from mocte_ds.data.verify import chunk_hashes, verify_prepared
from mocte_ds.errors import DataError, MocteError
from mocte_ds.training.start import _place_on_host


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


@pytest.mark.parametrize("seed", [1, 2])
def test_every_flipped_bit_is_refused(prepared: tuple[Path, Manifest], tmp_path: Path, seed: int) -> None:
    out, rng = shutil.copytree(prepared[0], tmp_path / "out"), random.Random(seed)
    for name in ("code_train.bin", "code_train.idx", "prose_validation.bin", "manifest.json"):
        for _ in range(12):
            bit = rng.randrange(8 * (out / name).stat().st_size)
            flip(out / name, bit)
            with pytest.raises(DataError, match="damaged|cannot be read|format|bytes|tells|no prepared"):
                verify_prepared(out, Manifest.read(out))
            if name == "code_train.bin":
                with pytest.raises(DataError, match="code_train.bin is damaged"):
                    BlendedLoader(out, "train", 32, 8, 0, 1, 8)
            flip(out / name, bit)
    verify_prepared(out, Manifest.read(out), "all")


def test_a_damaged_folder_is_not_taken_for_prepared(corpus, tokenizer, prepared, tmp_path) -> None:
    out = shutil.copytree(prepared[0], tmp_path / "out")
    assert not prepare(corpus, out, tokenizer, 0.1, workers=1, progress=False)[1]
    flip(out / "notes_train.bin", 777)
    with pytest.raises(MocteError, match="notes_train.bin"):
        prepare(corpus, out, tokenizer, 0.1, workers=1, progress=False)


def test_a_sample_and_the_share_of_each_process(prepared, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(verify, "CHUNK", 64)
    monkeypatch.setattr(verify, "_WHOLE", 1000)
    out = shutil.copytree(prepared[0], tmp_path / "out")
    old = Manifest.read(out)
    files = {name: chunk_hashes(out / name) for name in old.files}
    manifest = Manifest(**{**vars(old), "files": files})
    flip(out / "prose_train.bin", 0)  # in the first of many chunks
    found = [0, 0]
    for _ in range(5):
        for part in range(2):
            try:
                verify_prepared(out, manifest, "all", part, 2)
            except DataError:
                found[part] += 1
    assert found == [5, 0]
    chunks = len(files["prose_train.bin"])
    for amount in ("sample", "auto"):
        seen = [tuple(verify._chosen(chunks, 10**6, amount, 0, 1)) for _ in range(9)]
        assert all(len(set(s)) == verify.SAMPLE and max(s) < chunks for s in seen) and len(set(seen)) > 1
    assert list(verify._chosen(chunks, 900, "auto", 0, 1)) == list(range(chunks))


def test_what_a_manifest_claims(prepared, tmp_path) -> None:
    out = shutil.copytree(prepared[0], tmp_path / "out")
    values = json.loads((out / "manifest.json").read_text())
    values.pop("sha256")

    def claim(message: str, **changes) -> None:
        Manifest(**{**values, **changes}).write(out / "manifest.json")
        with pytest.raises(DataError, match=message):
            PackedDomain(out, Manifest.read(out), "code", "train", 32, 0)

    def code(**facts) -> dict:
        return {**values["domains"], "code": {**values["domains"]["code"], "train": facts}}

    train = values["domains"]["code"]["train"]
    claim("bytes instead of", domains=code(documents=10**12, tokens=10**15))
    claim("tells of", domains=code(documents=train["documents"], tokens=10**15))
    claim("damaged", domains=code(documents=-1, tokens=train["tokens"]))
    claim("damaged", domains=code(documents="9", tokens=train["tokens"]))
    claim("damaged", domains=code(documents=True, tokens=train["tokens"]))
    claim("outside of the vocabulary of 9", vocab_size=9)
    claim("no hashes of code_train.bin", files={})


def test_a_file_that_changes_later_gives_no_foreign_ids(prepared, tmp_path) -> None:
    out = shutil.copytree(prepared[0], tmp_path / "out")
    packed = PackedDomain(out, Manifest.read(out), "code", "train", 32, 0)
    size = (out / "code_train.bin").stat().st_size
    with open(out / "code_train.bin", "r+b") as file:
        file.write(np.full(size // 2, 9999, dtype=np.uint16).tobytes())
    with pytest.raises(DataError, match="code_train.bin has the token id 9999"):
        _ = packed[0]


def test_processes_of_a_host_share_the_work(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_SIZE", "8")
    assert _place_on_host() == (3, 8)
