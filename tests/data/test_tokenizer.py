"""Training a tokenizer: lossless, reproducible, and limits of the corpus are told as numbers that work."""

import json
import re
import subprocess
import sys

import pytest
import sentencepiece

from mocte_ds.data import Tokenizer, embedded_corpus, read_corpus, train_tokenizer
from mocte_ds.data import tokenizer as module
from mocte_ds.errors import DataError
from tools import train_tokenizer as tool


def test_lossless_on_any_text(tokenizer):
    mine = Tokenizer(tokenizer)
    for text in [
        "  two  spaces\n\n\ttab \n",
        "x = 1234\r\n",
        "日本語 ἀρχή 🙂 é e\u0301 \ufeff",
        "",
        " ",
        "</s><s><unk><0x41>",
        " leading",
        "trailing ",
        "\u2581a \u2581\u2581",
        "\0\x0b\x0c\x85\u2028\u3000",
        "\n" * 5 + "\t" * 5 + " " * 5,
    ]:
        assert mine.decode(mine.encode(text)) == text, repr(text)


def test_lossless_on_the_embedded_corpus(tmp_path):
    mine = Tokenizer(train_tokenizer(embedded_corpus(), tmp_path / "t.model", 2048))
    corpus = read_corpus(embedded_corpus())
    for domain in ("code_py", "wiki_fr", "math", "docs_en"):
        for text in corpus[domain]:
            assert mine.decode(mine.encode(text)) == text
    text = next(iter(corpus["code_py"]))
    assert len(mine.encode(text)) < len(text.encode()) / 1.8


def test_ids_are_those_of_sentencepiece(tokenizer):
    mine, plain = Tokenizer(tokenizer), sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    text = "def f(x):\n\treturn stone # größe"
    assert mine.encode(text) == plain.encode(text)
    assert [plain.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert mine.vocab_size == plain.vocab_size() == 340 and mine.eod_id == 2


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_named_limits_work(tmp_path, corpus, model_type):
    out = tmp_path / "t.model"
    with pytest.raises(DataError, match="vocab_size = 50000 is more than the corpus allows") as caught:
        train_tokenizer(corpus, out, 50000, model_type)
    assert not out.exists()
    largest = int(re.search(r"at most (\d+)", str(caught.value)).group(1))
    assert Tokenizer(train_tokenizer(corpus, out, largest, model_type)).vocab_size == largest
    before = out.read_bytes()
    with pytest.raises(DataError, match="vocab_size = 270 is too small.*need") as caught:
        train_tokenizer(corpus, out, 270, model_type)
    smallest = int(re.search(r"need (\d+)", str(caught.value)).group(1))
    assert 270 < smallest <= largest and out.read_bytes() == before


def test_training_is_reproducible_and_sampling_fair(corpus, tokenizer, tmp_path, monkeypatch):
    again = train_tokenizer(read_corpus(corpus), tmp_path / "t.model", 340)
    assert again.read_bytes() == tokenizer.read_bytes()
    texts = [f"{n:05} " + "x" * (n % 90) for n in range(1000)]
    some = module._sample(texts, 5000, "salt")
    size = sum(map(len, some))
    assert size >= 5000 > size - len(some[-1]) and set(some) < set(texts)
    assert some == module._sample(texts[::-1], 5000, "salt") != module._sample(texts, 5000, "other")
    assert sorted(module._sample(texts, 10**9, "salt")) == sorted(texts)
    monkeypatch.setattr(module, "SAMPLE_CHARACTERS", 3000)
    lines = list(module._sample_lines({"a": ["a" * 9000 + "\nb"], "b": ["c" * 100] * 90, "c": ["d" * 50]}, 0))
    assert [sum(line.count(c) for line in lines) for c in "abcd"] == [9000, 1, 1000, 50]
    assert max(map(len, lines)) <= 4000


def test_bad_models(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no such tokenizer"):
        Tokenizer(tmp_path / "t.model")
    (tmp_path / "t.model").write_bytes(b"no model")
    with pytest.raises(DataError, match="is not a sentencepiece model"):
        Tokenizer(tmp_path / "t.model")
    (tmp_path / "t.model").write_bytes(b"")
    with pytest.raises(DataError, match="is not a sentencepiece model"):
        Tokenizer(tmp_path / "t.model")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="could not write"):
        train_tokenizer({"a": ["some text " * 50]}, tmp_path / "file" / "t.model", 270)
    with pytest.raises(DataError, match="holds no text"):
        train_tokenizer({}, tmp_path / "t.model", 300)


def test_command_line(corpus, tmp_path, capsys):
    out = tmp_path / "new" / "t.model"
    arguments = [str(corpus), "--out", str(out), "--vocab-size", "330", "--json"]
    assert tool.main(arguments) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["vocab_size"] == 330 and facts["made"] and facts["sha256"] == Tokenizer(out).sha256
    assert tool.main([*arguments, "--if-missing"]) == 0
    assert not json.loads(capsys.readouterr().out)["made"]
    command = [sys.executable, tool.__file__, str(corpus), "--out", str(out), "--vocab-size", "99999"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "error: vocab_size = 99999" in done.stderr and "Traceback" not in done.stderr
