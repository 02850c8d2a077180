"""Prepared data: the tokens of the documents, made once, never half, and never taken for what they are not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDataset

from mocte_ds.data import Manifest, prepare, read_corpus, shard, train_tokenizer
from mocte_ds.errors import DataError, NotOurs
from tests.data.conftest import write_lines
from tools import prepare_data as tool


def stored(folder: Path, domain: str, split: str) -> list[list[int]]:
    data = IndexedDataset(str(folder / f"{domain}_{split}"))
    return [data[i].tolist() for i in range(len(data))]


def data_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def test_tokens_are_those_of_the_documents(corpus, tokenizer, prepared):
    out, manifest = prepared
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    mark = [plain.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
    for domain, texts in read_corpus(corpus).items():
        direct = []
        for text in texts:
            first, *others = [plain.encode(part) for part in text.split("\u2581")]
            direct.append(first + [i for part in others for i in mark + part] + [plain.eos_id()])
        train, held = stored(out, domain, "train"), stored(out, domain, "validation")
        assert sorted(train + held) == sorted(direct)
        for split, documents in (("train", train), ("validation", held)):
            facts = manifest.domains[domain][split]
            assert facts == {"documents": len(documents), "tokens": sum(map(len, documents))}
        assert [d for d in direct if d in train] == train  # the order is that of the file
    assert manifest.domains["prose"]["train"]["documents"] == pytest.approx(0.9 * 121, abs=10)
    assert sorted(path.name for path in out.iterdir() if path.suffix not in (".bin", ".idx")) == [
        ".lock",
        ".mocte-ds.json",
        "manifest.json",
        "tokenizer.model",
    ]


def test_processes_give_the_same_files(corpus, tokenizer, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "_BYTES_A_WORKER", 1)
    monkeypatch.setattr(shard, "_CHARACTERS_A_PART", 500)
    manifest, made = prepare(corpus, tmp_path / "out", tokenizer, 0.1, workers=2, progress=False)
    assert made and manifest == prepared[1]
    assert data_files(tmp_path / "out") == data_files(prepared[0])


def test_the_same_input_is_not_prepared_again(corpus, tokenizer, prepared, tmp_path):
    out = shutil.copytree(prepared[0], tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    again, made = prepare(corpus, out, tokenizer, 0.1, workers=1, progress=False)
    assert not made and again == prepared[1]
    again, made = prepare(corpus, out, out / "tokenizer.model", 0.1, workers=1, progress=False)
    assert not made and before == {path: path.stat().st_mtime_ns for path in before}


def test_changes_and_damage_are_noticed(corpus, tokenizer, prepared, tmp_path):
    first = prepared[1]
    corpus = shutil.copytree(corpus, tmp_path / "corpus")
    out = shutil.copytree(prepared[0], tmp_path / "out")
    (out / "mine.txt").write_text("of the user")
    with open(corpus / "code.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "print('more')" * 30}) + "\n")
    second, made = prepare(corpus, out, tokenizer, 0.1, workers=1, progress=False)
    assert made and second.sha256 != first.sha256
    assert second.domains["prose"] == first.domains["prose"] and second.domains["code"] != first.domains["code"]
    assert stored(out, "prose", "validation") == stored(prepared[0], "prose", "validation")
    # The split hangs on the text alone: what was held out before is held out now.
    old = {tuple(d) for d in stored(prepared[0], "code", "validation")}
    assert old <= {tuple(d) for d in stored(out, "code", "validation")}

    with open(out / "code_train.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(NotOurs, match="code_train.bin was changed since prepare_data wrote it"):
        prepare(corpus, out, tokenizer, 0.1, workers=1, progress=False)
    (out / "code_train.bin").unlink()
    assert prepare(corpus, out, tokenizer, 0.1, workers=1, progress=False) == (second, True)
    (out / "code_train.idx").unlink()
    assert prepare(corpus, out, tokenizer, 0.1, workers=1, progress=False) == (second, True)
    other = train_tokenizer(corpus, tmp_path / "other.model", 350)
    third, made = prepare(corpus, out, other, 0.1, workers=1, progress=False)
    assert made and third.vocab_size == 350
    (corpus / "notes.txt").unlink()
    fourth, made = prepare(corpus, out, other, 0.2, workers=1, progress=False)
    assert made and sorted(fourth.domains) == ["code", "prose"]
    assert not list(out.glob("notes_*")) and (out / "mine.txt").read_text() == "of the user"


def test_tiny_domains(tmp_path, tokenizer):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_lines(corpus / "two.jsonl", ["stone over river", "light falls"])
    manifest, _ = prepare(corpus, tmp_path / "out", tokenizer, 0.001, workers=1, progress=False)
    assert [manifest.domains["two"][split]["documents"] for split in ("train", "validation")] == [1, 1]
    manifest, _ = prepare(corpus, tmp_path / "out", tokenizer, 0.999, workers=1, progress=False)
    assert [manifest.domains["two"][split]["documents"] for split in ("train", "validation")] == [1, 1]
    write_lines(corpus / "one.jsonl", ["the same", "the same"])
    with pytest.raises(DataError, match="one.jsonl: one document .* cannot be split"):
        prepare(corpus, tmp_path / "out", tokenizer, 0.1, workers=1, progress=False)
    assert Manifest.read(tmp_path / "out") == manifest


def test_a_failing_write_keeps_what_was_there(corpus, tokenizer, prepared, tmp_path):
    """The process may not write files of more than 8 KB, so the system itself refuses in the middle of the work."""
    out = shutil.copytree(prepared[0], tmp_path / "out")
    before = data_files(out)
    code = (
        "import resource, sys\n"
        "from mocte_ds.cli import run_cli\n"
        "from mocte_ds.data import prepare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "run_cli(lambda: prepare(*sys.argv[1:4], 0.3, workers=1) and 0)\n"
    )
    command = [sys.executable, "-c", code, str(corpus), str(out), str(tokenizer)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 2, done.stderr
    assert "error: could not write prepared data to" in done.stderr and "make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert data_files(out) == before
    _, made = prepare(corpus, out, tokenizer, 0.1, workers=1, progress=False)
    assert not made


@pytest.mark.parametrize("moved", [1, 5])
def test_what_a_killed_process_left_is_removed(corpus, tokenizer, prepared, tmp_path, moved: int):
    """Killed when the first or some files should move into place (after the marker): the next start works."""
    out = shutil.copytree(prepared[0], tmp_path / "out")
    code = (
        "import os, sys\n"
        "from mocte_ds.data import prepare\n"
        "from mocte_ds.ownership import put\n"
        "replace, left = os.replace, [int(sys.argv[4])]\n"
        "def or_die(a, b):\n"
        "    if '.mocte-work-' in str(a) and os.path.dirname(b) == sys.argv[2]:\n"
        "        if not left[0]: os.kill(os.getpid(), 9)\n"
        "        left[0] -= 1\n"
        "    replace(a, b)\n"
        "os.replace = or_die\n"
        "prepare(*sys.argv[1:4], 0.3, workers=1)\n"
    )
    command = [sys.executable, "-c", code, str(corpus), str(out), str(tokenizer), str(moved)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == -9, done.stderr
    assert len(list(out.glob(".mocte-work-*"))) == 2
    with pytest.raises(DataError, match="holds no prepared data"):
        Manifest.read(out)
    manifest, made = prepare(corpus, out, tokenizer, 0.1, workers=1, progress=False)
    assert made and manifest == prepared[1]
    assert {**data_files(out), ".mocte-ds.json": b""} == {**data_files(prepared[0]), ".mocte-ds.json": b""}


def test_bad_arguments_and_manifests(corpus, tokenizer, prepared, tmp_path):
    with pytest.raises(DataError, match="validation_share = 0 must lie"):
        prepare(corpus, tmp_path, tokenizer, 0, workers=1)
    with pytest.raises(DataError, match="workers = 0"):
        prepare(corpus, tmp_path, tokenizer, workers=0)
    with pytest.raises(DataError, match="no such tokenizer"):
        prepare(corpus, tmp_path, tmp_path / "none.model")
    with pytest.raises(DataError, match="is not a folder"):
        prepare(tmp_path / "none", tmp_path, tokenizer)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="could not write prepared data"):
        prepare(corpus, tmp_path / "file" / "out", tokenizer)
    for content in ("{", "[]", '{"format": 2}', '{"format": 2, "domains": {"a": {}}}', "[" * 100_000):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(DataError, match="manifest.json is damaged"):
            Manifest.read(tmp_path)
    values = json.loads((prepared[0] / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(DataError, match="has format 99"):
        Manifest.read(tmp_path)


def test_tokenizer_of_other_data_is_refused(corpus, tokenizer, prepared, tmp_path):
    manifest = prepared[1]
    assert manifest.require_tokenizer(tokenizer).vocab_size == 340
    other = train_tokenizer(corpus, tmp_path / "other.model", 350)
    with pytest.raises(DataError, match=r"other.model \(350 pieces.* is not the tokenizer .*\(340 pieces"):
        manifest.require_tokenizer(other)


def test_command_line(corpus, tokenizer, tmp_path, capsys):
    arguments = ["--tokenizer", str(tokenizer), "--out", str(tmp_path / "out")]
    assert tool.main([str(corpus), *arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["made"] and facts["sha256"] == Manifest.read(tmp_path / "out").sha256
    total = sum(facts["domains"][d][s]["tokens"] for d in facts["domains"] for s in ("train", "validation"))
    assert total * np.dtype(np.uint16).itemsize == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.bin"))
    assert tool.main([str(corpus), *arguments]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("found") and f"{facts['domains']['prose']['train']['tokens']:,}" in shown
    near = {"text": " ".join(f"word{n}" for n in range(40))}
    texts = [near, {"text": f"{near['text']} and more"}, *({"text": f"alone {n}"} for n in range(20))]
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "twins.jsonl").write_text("\n".join(json.dumps(text) for text in texts))
    assert tool.main([str(tmp_path / "near"), *arguments[:3], str(tmp_path / "twins")]) == 0
    shown = capsys.readouterr().out
    (row,) = (line.split() for line in shown.splitlines() if line.startswith("twins "))
    assert row[-1] == "2" and "documents that share 13 words in a row" in shown
    (tmp_path / "empty").mkdir()
    command = [sys.executable, tool.__file__, str(tmp_path / "empty"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "error:" in done.stderr and "Traceback" not in done.stderr
