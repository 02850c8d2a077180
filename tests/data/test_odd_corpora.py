"""Corpora with odd files: read, skipped by name, or refused by name within bounded memory and time."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from mocte_ds.data import Documents, documents, lines, prepare, read_corpus
from mocte_ds.data.documents import DocumentFile
from mocte_ds.data.stored_tokenizer import open_tokenizer
from mocte_ds.errors import DataError, MocteError
from tests.data.conftest import write_lines

LINE = b'{"text": "a text"}\n'


def test_formats_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a.JSONL").write_bytes(LINE)
    (tmp_path / "b.json").write_bytes(LINE)
    (tmp_path / "c.Txt.GZ").write_bytes(gzip.compress(b"one\n\ntwo"))
    packed = pyarrow.compress(LINE, codec="zstd", asbytes=True)
    (tmp_path / "d.jsonl.zst").write_bytes(packed + packed)
    (tmp_path / "notes.txt.jsonl").write_bytes(LINE)
    (tmp_path / "many" / "deep").mkdir(parents=True)
    write_lines(tmp_path / "many" / "2.jsonl", ["second"])
    write_lines(tmp_path / "many" / "1.jsonl.gz", ["first"])
    write_lines(tmp_path / "many" / "deep" / "3.jsonl", ["third"])
    (tmp_path / "many" / "table.csv").write_text("text\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "many")
    with pytest.warns(UserWarning) as said:
        corpus = {domain: list(texts) for domain, texts in read_corpus(tmp_path).items()}
    assert corpus == {
        "a": ["a text"],
        "b": ["a text"],
        "c": ["one", "two"],
        "d": ["a text"] * 2,
        "many": ["first", "second", "third"],
        "notes.txt": ["a text"],
    }
    message = str(said[0].message)
    assert all(part in message for part in ("'many/table.csv' (not a format", "'empty' (", "'linked' (a link to a"))
    with pytest.warns(UserWarning):
        assert list(read_corpus(tmp_path)["many"]) == ["first", "second", "third"]
    (tmp_path / "many.txt").write_text("x")
    with pytest.raises(DataError, match="two files of the domain 'many': many and many.txt"):
        read_corpus(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\r\nline\r\n\r\ntwo\r\n", ["one\nline", "two"]),
        (b"one\rline\r\rtwo\r", ["one\nline", "two"]),
        (b"10 %\r20 %\n\nx\n", ["10 %\r20 %", "x"]),
        (b"one\n \t\ntwo\n\n\n\n   indented\n", ["one", "two", "   indented"]),
        ("\ufeffone\x0cmore\u2028z\x85\n\ntwo".encode(), ["one\x0cmore\u2028z\x85", "two"]),
    ],
)
def test_paragraphs(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert list(Documents(tmp_path / "a.txt")) == expected


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="a.jsonl is a device, pipe or socket"):
        read_corpus(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.txt").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="b.txt is a device, pipe or socket"):
        read_corpus(tmp_path)
    (tmp_path / "b.txt").unlink()
    (tmp_path / "c.jsonl").symlink_to("nowhere")
    with pytest.raises(DataError, match="c.jsonl cannot be read.*mend or remove the link"):
        read_corpus(tmp_path)


def test_no_document_is_larger_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lines, documents):
        monkeypatch.setattr(module, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(lines, "_MAX_BLANK", 1 << 20)
    bombs = {
        "a.jsonl.gz": gzip.compress(LINE + b"\0" * (8 << 20)),
        "b.jsonl.zst": pyarrow.compress(LINE + b" " * (8 << 20), codec="zstd", asbytes=True),
        "c.txt": b"word " * 100 + b"\n" + b"some more words\n" * 100_000,
        "d.jsonl.gz": gzip.compress(LINE + b"\n" * (2 << 20)),
    }
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}, line .*cut it into documents of at most 1 MiB"):
            list(Documents(tmp_path / name))
    table = pyarrow.table({"text": ["x", "y" * (2 << 20)]})
    parquet.write_table(table, tmp_path / "e.parquet")
    with pytest.raises(DataError, match="e.parquet, row 2: a text of more than 1 MiB"):
        list(Documents(tmp_path / "e.parquet"))


def test_a_huge_value_that_repeats_is_made_once(tmp_path: Path) -> None:
    """A file of some kilobytes that would fill gigabytes."""
    value = "y" * (96 << 20)
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays([0] * 64, [value])})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    script = (
        "import sys\n"
        "from mocte_ds.data import Documents\n"
        "try:\n"
        "    list(Documents(sys.argv[1]))\n"
        "except Exception as error:\n"
        "    print(error)\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a.parquet"], capture_output=True, text=True)
    told, peak = done.stdout.splitlines()
    assert "a.parquet, row 1: a text of more than 64 MiB" in told
    assert 1024 * int(peak) < 16 * len(value), peak  # of 64; how often pyarrow copies depends on its version


def test_deep_json_and_tables_with_two_texts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE + b'{"text": "a", "b": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n")
    with pytest.raises(DataError, match=r"a.jsonl, line 2: no JSON \(.*RecursionError"):
        list(Documents(tmp_path / "a.jsonl"))
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=["text", "n", "text"])
    parquet.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r'2 columns are called "text" \(found: .*\'n\''):
        list(Documents(tmp_path / "b.parquet"))
    coded = pyarrow.table({"text": pyarrow.array(["a", "b", "a"]).dictionary_encode()})
    parquet.write_table(coded, tmp_path / "c.parquet")
    assert list(Documents(tmp_path / "c.parquet")) == ["a", "b", "a"]


def test_ids_outside_of_the_vocabulary_are_refused(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(open_tokenizer(tokenizer))
    monkeypatch.setattr(kind, "encode", lambda self, text: [5, 340])
    with pytest.raises(DataError, match="token id 340, outside of the vocabulary of 340"):
        prepare(corpus, tmp_path / "out", tokenizer, 0.1, workers=1, progress=False)


def mutated(rng: random.Random, content: bytes) -> bytes:
    """Some bytes changed, cut out, doubled or put in."""
    parts = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(parts))
        what = rng.randrange(4)
        if what == 0:
            parts[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del parts[at : at + rng.randint(1, 40)]
        elif what == 2:
            parts[at:at] = parts[at : at + rng.randint(1, 40)]
        else:
            parts[at:at] = rng.choice(
                [b"\0", b"\r", b"\xff", b"\xed\xa0\x80", b"{", b'"', b"\n\n", b"[" * 3000, b"9" * 5000]
            )
        parts = parts or bytearray(b"x")
    return bytes(parts)


@pytest.mark.parametrize("seed", [11, 12])
def test_damaged_files_end_with_texts_or_a_message(tmp_path: Path, seed: int) -> None:
    """Whatever the bytes are: documents that can be stored, or an error that names the file."""
    rng = random.Random(seed)
    texts = [f"document {n} größe 日本 " + "word " * rng.randint(1, 30) for n in range(12)]
    plain = "".join(json.dumps({"text": text, "n": None}) + "\n" for text in texts).encode()
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "whole.parquet")
    sound = {
        "a.jsonl": plain,
        "b.jsonl.gz": gzip.compress(plain),
        "c.json.zst": pyarrow.compress(plain, codec="zstd", asbytes=True),
        "d.txt": "\n\n".join(texts).encode(),
        "e.parquet": (tmp_path / "whole.parquet").read_bytes(),
    }
    for number in range(300):
        name = rng.choice(sorted(sound))
        path = tmp_path / name
        path.write_bytes(mutated(rng, sound[name]))
        try:
            for text in Documents(path):
                assert text.strip() and text.encode("utf-8")
        except MocteError as error:
            assert str(path) in str(error) and len(str(error)) < 2000, number


def test_two_texts_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "first", "id": 1, "text": "second"}\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2: .*'text' is there twice"):
        list(DocumentFile(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("end", ["\r\n", "\r"])
@pytest.mark.parametrize("packed", [False, True])
def test_line_ends_at_the_edge_of_what_is_looked_at(end: str, packed: bool, tmp_path: Path) -> None:
    """The first line end straddles byte 2^20, or ends there."""
    for length in ((1 << 20) - 2, (1 << 20) - 1):
        content = (end.join(["a" * length, "b", "", "c"]) + end).encode()
        path = tmp_path / ("a.txt.gz" if packed else "a.txt")
        path.write_bytes(gzip.compress(content) if packed else content)
        assert list(DocumentFile(path)) == ["a" * length + "\nb", "c"]
