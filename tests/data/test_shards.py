"""Shards of a corpus: together they are what one process makes, interrupted or not; others are not put together."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from mocte_ds.data import prepare, shard, train_tokenizer, units
from mocte_ds.data.indexed import merge, prepare_shard
from mocte_ds.data.shard import Share
from mocte_ds.data.token_file import TokenFile
from mocte_ds.errors import DataError, NotOurs
from tests.data.conftest import write_lines
from tests.data.test_split import runs
from tools import prepare_data as tool

SMALL = {"PIECE_BYTES": 6_000, "WHOLE_BYTES": 20_000}
"""Bytes, so that a corpus of some 100 KB is cut as one of many GB is."""


def words(seed: int, count: int) -> str:
    return " ".join(f"w{n}" for n in np.random.default_rng(seed).integers(0, 10**6, count))


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains: one file that is cut, many small files in a folder, and a compressed one; pairs of
    near-duplicates stand in one file far apart, in two files and in two domains."""
    folder = tmp_path_factory.mktemp("spread")
    shared = [words(7000 + n, 20) for n in range(30)]
    large = [f"{words(n, 60)} {shared[n % 15]}" if n < 30 or n >= 120 else words(n, 75) for n in range(150)]
    write_lines(folder / "large.jsonl", large)
    (folder / "many" / "deep").mkdir(parents=True)
    for number in range(12):
        texts = [f"{words(1000 + 10 * number + n, 30)} {shared[15 + number]}" for n in range(2)]
        write_lines(
            folder / "many" / f"{number:02}.jsonl", [*texts, *(words(2000 + 9 * number + n, 40) for n in range(9))]
        )
    (folder / "many" / "deep" / "x.txt").write_text("\n\n".join(words(3000 + n, 30) for n in range(20)))
    packed = [f"{shared[n % 30]} {words(4000 + n, 40)}" if n < 30 else words(4000 + n, 60) for n in range(90)]
    write_lines(folder / "packed.jsonl.gz", packed)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(units, name, value)
    monkeypatch.setattr(shard, "_CHARACTERS_A_PART", 1_000)


@pytest.fixture(scope="module")
def expected(spread: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of the corpus, uncut."""
    out = tmp_path_factory.mktemp("expected") / "out"
    prepare(spread, out, tokenizer, 0.1, workers=1, progress=False)
    return files(out)


def files(folder: Path) -> dict[str, bytes]:
    """Of prepared data; the marker lists files in the order in which they came."""
    left_out = (".lock", ".mocte-ds.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name not in left_out}


def make(corpus: Path, out: Path, tokenizer: Path, of: int) -> list[Path]:
    folders = [out / f"{number}" for number in range(1, of + 1)]
    for number, folder in enumerate(folders, 1):
        prepare_shard(corpus, folder, tokenizer, Share(number, of), workers=1, progress=False)
    return folders


@pytest.mark.parametrize("of", [1, 2, 3])
def test_shards_give_the_files_of_one_process(
    of: int, spread: Path, tokenizer: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    folders = make(spread, tmp_path, tokenizer, of)
    amounts = [sum(path.stat().st_size for path in folder.glob("*.npz")) for folder in folders]
    assert max(amounts) < 2.5 * min(amounts), amounts  # each has its part of the work
    _, made = merge(folders[::-1], tmp_path / "out", tokenizer, 0.1, progress=False)
    assert made and files(tmp_path / "out") == expected
    again, made = merge(folders, tmp_path / "out", tokenizer, 0.1, progress=False)
    assert not made and again.near_duplicates == {"words": 13, "kept_share": 1.0}
    assert again.domains["large"]["near_duplicates"]["documents"] == 60


def test_validation_is_free_of_what_is_trained_on(spread: Path, tokenizer: Path, tmp_path: Path) -> None:
    """By the texts themselves: pairs of near-duplicates lie in different shards and end on one side."""
    folders = make(spread, tmp_path, tokenizer, 3)
    prepare_data = tool.main([
        "--merge", *map(str, folders), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer),
        "--validation-share", "0.2",
    ])  # fmt: skip
    assert prepare_data == 0
    sides = {"train": set(), "validation": set()}
    owners: dict[tuple[str, ...], set[int]] = {}
    from mocte_ds.data.tokenizer import Tokenizer
    from tests.data.test_indexed import stored

    decode = Tokenizer(tokenizer).decode
    for domain in ("large", "many", "packed"):
        for side, found in sides.items():
            for ids in stored(tmp_path / "out", domain, side):
                found |= runs(decode(ids[:-1]))
    assert len(sides["validation"]) > 1000 and not sides["train"] & sides["validation"]
    for number, folder in enumerate(folders):
        for path in folder.glob("*.npz"):
            with np.load(path) as piece:
                for value in piece["hashes"].tolist():
                    owners.setdefault(value, set()).add(number)
    assert sum(len(found) > 1 for found in owners.values()) > 200  # shared across shards


def test_a_limit_of_hashes_is_that_of_one_process(
    spread: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard leaves hashes out by what it has seen, and the merge by all: the same remain as of one process."""
    from mocte_ds.data import signatures

    monkeypatch.setattr(signatures, "MAX_HASHES", 3_000)
    whole, _ = prepare(spread, tmp_path / "whole", tokenizer, 0.1, workers=1, progress=False)
    folders = make(spread, tmp_path, tokenizer, 2)
    merged, _ = merge(folders, tmp_path / "out", tokenizer, 0.1, progress=False)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert merged == whole and merged.near_duplicates["kept_share"] == 1 / 8  # of some 22,000


def killed_after(calls: int, work: Callable[[], object]) -> bool:
    """Do something in a process of its own, which is killed at its n-th change of the disk; whether it was."""

    def run() -> None:
        left = [calls]

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def or_die(*args: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **options)

            return or_die

        for name in ("replace", "unlink", "fsync", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def pieces(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.rglob("*.npz") if ".mocte-work-" not in str(path)}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["1/2", "whole"])
def test_what_was_killed_goes_on(
    part: str, spread: Path, tokenizer: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Killed at random changes of the disk, again and again: what was done stays as it is, and the end is the same."""
    out, draw, before, killed = tmp_path / "one", random.Random(part), dict[str, int](), 0

    def work() -> None:
        if part == "whole":
            prepare(spread, out, tokenizer, 0.1, workers=1, progress=False)
        else:
            prepare_shard(spread, out, tokenizer, Share.parse(part), workers=1, progress=False)

    while killed_after(draw.randint(10, 120), work):
        now, killed = pieces(out), killed + 1
        complete = (out / "manifest.json").exists()  # then the pieces go
        assert complete or before.items() <= now.items(), "made again"
        before = now
        assert killed < 60
    assert killed >= 3
    if part == "whole":
        assert files(out) == expected and not (out / "unfinished").exists()
    else:
        made = prepare_shard(spread, out, tokenizer, Share(1, 2), workers=1, progress=False)
        assert made.made == 0 and made.found == len(pieces(out)) > 5
        prepare_shard(spread, tmp_path / "two", tokenizer, Share(2, 2), workers=1, progress=False)
        merge([out, tmp_path / "two"], tmp_path / "out", tokenizer, 0.1, progress=False)
        assert files(tmp_path / "out") == expected


def test_a_changed_file_alone_is_made_again(spread: Path, tokenizer: Path, tmp_path: Path) -> None:
    corpus, out = shutil.copytree(spread, tmp_path / "corpus"), tmp_path / "shard"
    first = prepare_shard(corpus, out, tokenizer, Share(), workers=1, progress=False)
    assert first.found == 0
    write_lines(corpus / "packed.jsonl.gz", [words(n, 50) for n in range(30)])
    second = prepare_shard(corpus, out, tokenizer, Share(), workers=1, progress=False)
    others = {name for unit, made in first.record.made.items() if unit != "14" for name in made.values()} - {""}
    assert second.found == len(others)  # all but those of the last of 15 units
    assert 0 < second.made < first.made and len(pieces(out)) == second.found + second.made
    merge([out], tmp_path / "out", tokenizer, 0.1, progress=False)
    prepare(corpus, tmp_path / "whole", tokenizer, 0.1, workers=1, progress=False)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_what_does_not_belong_together_is_refused(
    corpus: Path, spread: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = shutil.copytree(spread, tmp_path / "changed")
    one, two, three = make(spread, tmp_path / "a", tokenizer, 3)

    def check(message: str, *folders: Path, model: Path = tokenizer) -> None:
        with pytest.raises(DataError, match=message):
            merge(folders, tmp_path / "out", model, 0.1, progress=False)
        assert not (tmp_path / "out").exists()

    check("shards are missing: 2/3", one, three)
    check(f"shard 1/3 is there twice: {one} and {one}", one, one, two, three)
    check("holds no shard.json", one, tmp_path)
    other = train_tokenizer(corpus, tmp_path / "other.model", 350)
    check("made with another tokenizer", one, two, three, model=other)
    make_one = lambda name, where, model, share: prepare_shard(  # noqa: E731
        where, tmp_path / name, model, share, workers=1, progress=False
    )
    make_one("half", spread, tokenizer, Share(2, 2))
    check("shard 2/2 in .*half does not belong to shard 1/3", one, tmp_path / "half")
    make_one("model", spread, other, Share(2, 3))
    check("shard 2/3 in .*model does not belong to .*: tokenizer is", one, tmp_path / "model", three)
    with open(changed / "many" / "deep" / "x.txt", "a") as file:
        file.write("\n\nmore")
    make_one("grown", changed, tokenizer, Share(2, 3))
    check("many/deep/x.txt had .* bytes and .* bytes", one, tmp_path / "grown", three)
    shutil.copyfile(spread / "many" / "deep" / "x.txt", changed / "many" / "deep" / "x.txt")
    text = (changed / "large.jsonl").read_text()
    (changed / "large.jsonl").write_text(text.replace("w", "v", 1))
    make_one("edited", changed, tokenizer, Share(2, 3))
    check("large.jsonl was changed between the two", one, tmp_path / "edited", three)
    with monkeypatch.context() as patch:
        patch.setattr(units, "PIECE_BYTES", 7_000)
        make_one("cut", spread, tokenizer, Share(2, 3))
    check("piece_bytes is 7000 and 6000", one, tmp_path / "cut", three)
    with pytest.raises(DataError, match="holds shard 1/3, and not shard 2/3"):
        make_one(str(one), spread, tokenizer, Share(2, 3))

    record = json.loads((two / "shard.json").read_text())
    (two / "shard.json").write_text(json.dumps({**record, "of": 4}))
    check("shard.json is damaged", one, two, three)
    (two / "shard.json").write_text(json.dumps(record, indent=1) + "\n")
    victim = max(two.glob("*.npz"), key=lambda path: path.stat().st_size)
    content = victim.read_bytes()
    for damaged in (content[: len(content) // 2], content[:300] + bytes([content[300] ^ 1]) + content[301:]):
        victim.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{victim.name} is missing or damaged"):
            merge([one, two, three], tmp_path / "out", tokenizer, 0.1, progress=False)
        with pytest.raises(NotOurs, match="was changed since prepare_data wrote it"):
            make_one(str(two), spread, tokenizer, Share(2, 3))
    victim.unlink()
    repaired = make_one(str(two), spread, tokenizer, Share(2, 3))
    assert repaired.made == 1 and victim.read_bytes() == content
    assert merge([one, two, three], tmp_path / "out", tokenizer, 0.1, progress=False)[1]


def test_an_unfinished_shard_and_odd_files(spread: Path, tokenizer: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    assert killed_after(60, lambda: prepare_shard(spread, one, tokenizer, Share(), workers=1, progress=False))
    with pytest.raises(DataError, match="shard 1/1 in .*one is not finished; start it again"):
        merge([one], tmp_path / "out", tokenizer, 0.1, progress=False)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_lines(corpus / "a.jsonl", [" "] * 3000)
    for number in (1, 2):
        prepare_shard(corpus, tmp_path / f"{number}", tokenizer, Share(number, 2), workers=1, progress=False)
    with pytest.raises(DataError, match="a.jsonl holds no document with text"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "out", tokenizer, 0.1, progress=False)


def test_a_file_that_changes_while_it_is_read(
    spread: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, store = shutil.copytree(spread, tmp_path / "corpus"), shard.Piece.write

    def write(self: shard.Piece, path: Path) -> None:
        store(self, path)
        os.utime(corpus / "large.jsonl")

    monkeypatch.setattr(shard.Piece, "write", write)
    with pytest.raises(DataError, match="large.jsonl was changed while it was read"):
        prepare(corpus, tmp_path / "out", tokenizer, 0.1, workers=1, progress=False)
    assert not pieces(tmp_path / "out")


def test_the_index_is_megatrons(tmp_path: Path) -> None:
    """Byte for byte, for both types of ids and also without a document."""
    for vocab_size, kind in ((1000, np.uint16), (100_000, np.int32)):
        for count in (0, 3):
            documents = [np.arange(1, length, dtype=kind) for length in (5, 2, 9)][:count]
            with TokenFile(tmp_path / "ours", vocab_size) as ours:
                ours.add(np.concatenate([np.empty(0, dtype=kind), *documents]), np.array([4, 1, 8][:count]))
            theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=kind)
            for document in documents:
                theirs.add_document(document, [len(document)])
            theirs.finalize(str(tmp_path / "theirs.idx"))
            for end in (".bin", ".idx"):
                assert (tmp_path / f"ours{end}").read_bytes() == (tmp_path / f"theirs{end}").read_bytes()


MEASURED = """
import sys
from mocte_ds.data import indexed, shard, signatures, units
from mocte_ds.data.tokenizer import Tokenizer
units.PIECE_BYTES, units.WHOLE_BYTES, signatures.MAX_HASHES = 1 << 18, 1 << 20, 20_000
Tokenizer.encode = lambda self, text: [7] * (len(text) // 16)  # what is measured is what is held, not sentencepiece
def peak():
    return int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))) << 10
*warm, corpus, out, tokenizer = sys.argv[1:]
for place, folder in ((warm[0], out + '/warm'), (corpus, out + '/all')):
    indexed.prepare(place, folder, tokenizer, 0.1, workers=1, progress=False)
    print(peak())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tokenizer: Path, tmp_path: Path) -> None:
    """24 MB of text after 3 MB of it: the peak rises by less than a quarter of what is more."""
    sizes = []
    for name, count in (("warm", 1), ("all", 8)):
        (tmp_path / name).mkdir()
        texts = [words(100 * count + n, 40_000) for n in range(10)]
        lines = [f"{n} {repeat} {text}" for repeat in range(count) for n, text in enumerate(texts)]
        path = write_lines(tmp_path / name / "a.jsonl", lines)
        sizes.append(path.stat().st_size)
    command = [
        sys.executable,
        "-c",
        MEASURED,
        *(str(tmp_path / name) for name in ("warm", "all", "out")),
        str(tokenizer),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after - before < (sizes[1] - sizes[0]) / 4, (before, after, sizes)


def test_command_line(spread: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = ["--tokenizer", str(tokenizer), "--workers", "1"]
    assert tool.main([str(spread), *rest, "--out", str(tmp_path / "s"), "--shard", "1/1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["pieces_found"] == 0 and facts["pieces_made"] == len(pieces(tmp_path / "s"))
    assert tool.main([str(spread), *rest, "--out", str(tmp_path / "s"), "--shard", "1/1"]) == 0
    assert f"{facts['pieces_made']} pieces were there, 0 were made" in capsys.readouterr().out
    assert tool.main(["--merge", str(tmp_path / "s"), *rest, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("prepared")
    for wrong, message in (
        (["--shard", "3/2"], "'3/2' is not like 3/8"),
        ([str(spread), "--merge", str(tmp_path / "s")], "name no corpus"),
        (["--shard", "1/2", "--validation-share", "0.1"], "chosen when the shards are merged"),
        (["--shard", "1/2", "--merge", "x"], "not allowed with"),
    ):
        with pytest.raises(SystemExit):
            tool.main([*wrong, *rest, "--out", str(tmp_path / "o")])
        assert message in capsys.readouterr().err
