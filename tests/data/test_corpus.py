"""Reading a corpus: all formats give the same texts, no trace is left, bad files are named with their line."""

import gzip
import os
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import parquet

from mocte_ds.data import Documents, embedded_corpus, read_corpus
from mocte_ds.errors import DataError
from tests.data.conftest import write_lines

TEXTS = ["one\ntwo", "日本語 ἀρχή 🙂", "\tx =  1", "2020-01-01"]


def test_embedded_corpus_has_nine_domains_of_text():
    corpus = {domain: list(texts) for domain, texts in read_corpus(embedded_corpus()).items()}
    assert len(corpus) == 9
    assert sum(len(text.encode()) for texts in corpus.values() for text in texts) == pytest.approx(5.0e6, rel=0.05)
    assert [len(corpus[domain]) for domain in ("wiki_en", "books_en", "speech_en", "code_py")] == [1773, 527, 33, 92]


def test_every_format_gives_the_same_texts(tmp_path):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    write_lines(tmp_path / "b.jsonl.gz", TEXTS)
    parquet.write_table(pyarrow.table({"n": range(4), "text": TEXTS}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("\n\n".join(TEXTS) + "\n\n\n \n", encoding="utf-8")
    (tmp_path / "README.md").write_text("no corpus file")
    (tmp_path / "_old.jsonl").write_text("left out")
    corpus = read_corpus(tmp_path)
    assert list(corpus) == ["a", "b", "c", "d"]
    for texts in corpus.values():
        assert list(texts) == TEXTS and list(texts) == TEXTS  # a second pass reads the file again


def test_texts_arrive_unchanged(tmp_path):
    lines = [
        b'\xef\xbb\xbf{"text": "after a byte order mark", "meta": 1}\r\n',
        b'\n{"text": "a\\r\\n\\u0000b\xe2\x80\xa8c", "meta": "now a string"}\n',
        b'{"text": " \\n "}\n{"meta": null, "text": "2020-01-02T00:00:00Z"}',
    ]
    folder = tmp_path / "[odd] {name}*?"
    folder.mkdir()
    (folder / "a[1].jsonl").write_bytes(b"".join(lines))
    expected = ["after a byte order mark", "a\r\n\0b\u2028c", "2020-01-02T00:00:00Z"]
    assert list(read_corpus(folder)["a[1]"]) == expected


def test_reading_leaves_no_trace_and_needs_no_network(tmp_path, corpus):
    for name in ("home", "here", "tmp"):
        (tmp_path / name).mkdir()
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse\n"
        "from mocte_ds.data.corpus import read_corpus\n"
        "print(sum(len(list(texts)) for texts in read_corpus(sys.argv[1]).values()))\n"
    )
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code, str(corpus)],
        cwd=tmp_path / "here",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["261"]
    assert not any(any((tmp_path / name).iterdir()) for name in ("home", "here", "tmp"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bad.jsonl is empty"),
        (b'{"text": "fine"}\n{"text": "bad \xff"}\n', "line 2: not UTF-8"),
        (b'{"text": "fine"}\n{"body": "x"}\n', r"line 2: no text under \"text\" \(keys: \['body'\]\)"),
        (b'{"text": 3}\n', r"line 1: no text under \"text\" \(text is int\)"),
        (b'\n\n{"text": null}\n', r"line 3: no text under \"text\" \(text is NoneType\)"),
        (b'{"text": "fine"}\n["x"]\n', "line 2: no object but list"),
        (b'{"text": "fine"}\n{"text": \n', "line 2: no JSON"),
        (b'{"text": "a\\ud800b"}\n', "line 1: half of a surrogate pair at character 1"),
        (b"\n\n", "no document with text"),
        (b'{"text": "  "}\n', "no document with text"),
    ],
)
def test_bad_lines(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_corpus(tmp_path)["bad"])
    assert str(tmp_path / "bad.jsonl") in str(caught.value)


def test_bad_files(tmp_path):
    def check(name, message):
        with pytest.raises(DataError, match=f"{name}.*{message}"):
            list(Documents(tmp_path / name))

    check("gone.jsonl", "cannot be read")
    packed = gzip.compress(b'{"text": "x"}\n' * 500)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-12])
    check("cut.jsonl.gz", "cannot be read")
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"text": "x"}\n')
    check("plain.jsonl.gz", "")
    (tmp_path / "latin.txt").write_bytes("fine\n\ngröße".encode("latin-1"))
    check("latin.txt", "line 3: not UTF-8")
    (tmp_path / "no.parquet").write_bytes(b"no parquet")
    check("no.parquet", "is not a parquet file")
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    check("a.parquet", r"no column \"text\" \(found: \['body'\]\)")
    parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "b.parquet")
    check("b.parquet", "holds int64, not strings")
    parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "c.parquet")
    check("c.parquet", "row 2: no text")


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        read_corpus(tmp_path / "none")
    with pytest.raises(DataError, match="holds no DOMAIN"):
        read_corpus(tmp_path)
    write_lines(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="two files of the domain 'a': a.jsonl and a.txt"):
        read_corpus(tmp_path)
