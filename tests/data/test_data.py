"""Tokenizer, corpus, prepared data and loader: lossless, resumable, the same for any number of ranks, clear errors."""

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mocte_ds.data import BlendedLoader, Manifest, Tokenizer, embedded_corpus, prepare, read_corpus, train_tokenizer
from mocte_ds.data import validation_batches
from mocte_ds.data.loader import PackedDomain
from mocte_ds.errors import DataError

CONTEXT = 32


def write_corpus(folder: Path) -> Path:
    folder.mkdir()
    words = "the a of river stone light over under bright dark moves falls".split()
    generator = np.random.default_rng(0)
    with gzip.open(folder / "prose.jsonl.gz", "wt", encoding="utf-8") as file:
        for _ in range(120):
            file.write(json.dumps({"text": " ".join(generator.choice(words, 60)) + "."}) + "\n")
    with open(folder / "code.jsonl", "w", encoding="utf-8") as file:
        for n in range(60):
            file.write(json.dumps({"text": f"def f{n}(x):\n\treturn x  +  {n}\n\n# größe 日本\n" * 6}) + "\n")
    (folder / "notes.txt").write_text("\n\n".join(f"note {n} about stone and light" for n in range(80)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, Path, Manifest]:
    root = tmp_path_factory.mktemp("data")
    corpus = write_corpus(root / "corpus")
    tokenizer = train_tokenizer(read_corpus(corpus), root / "tokenizer.model", 340)
    manifest, made = prepare(corpus, root / "out", tokenizer, 0.1, workers=1, progress=False)
    assert made
    return corpus, root / "out", manifest


def test_tokenizer_is_lossless(prepared):
    tokenizer = Tokenizer(prepared[1] / "tokenizer.model")
    for text in ["  two  spaces\n\n\ttab \n", "x = 1234\r\n", "日本語 ἀρχή 🙂", "", "</s><s>", " leading", "trailing "]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == 340 and tokenizer.eod_id == 2


def test_embedded_corpus_has_nine_domains_of_text():
    corpus = read_corpus(embedded_corpus())
    assert len(corpus) == 9 and sum(len(text) for texts in corpus.values() for text in texts) > 4_500_000


def test_prepared_tokens_are_those_of_the_documents(prepared):
    corpus, out, manifest = prepared
    tokenizer = Tokenizer(out / "tokenizer.model")
    for domain, texts in read_corpus(corpus).items():
        direct = sorted(tokenizer.encode(text) + [tokenizer.eod_id] for text in texts)
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        stored = []
        for split in ("train", "validation"):
            data = IndexedDataset(str(out / f"{domain}_{split}"))
            stored += [data[i].tolist() for i in range(len(data))]
            facts = manifest.domains[domain][split]
            assert facts["documents"] == len(data) and facts["tokens"] == sum(len(data[i]) for i in range(len(data)))
        assert sorted(stored) == direct


def test_prepare_reuses_and_notices_changes(prepared, tmp_path):
    corpus, out, manifest = prepared
    tokenizer = out / "tokenizer.model"
    again, made = prepare(corpus, out, tokenizer, 0.1, workers=1, progress=False)
    assert not made and again == manifest
    other = tmp_path / "corpus"
    other.mkdir()
    for path in corpus.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    first, _ = prepare(other, tmp_path / "out", tokenizer, 0.1, workers=1, progress=False)
    with open(other / "code.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "print('more')" * 30}) + "\n")
    second, made = prepare(other, tmp_path / "out", tokenizer, 0.1, workers=1, progress=False)
    assert made and second.sha256 != first.sha256
    assert second.domains["prose"] == first.domains["prose"]


def test_an_epoch_shows_every_token_once(prepared):
    _, out, manifest = prepared
    packed = PackedDomain(out, "prose", "train", CONTEXT, seed=3)
    epochs = [np.concatenate([packed[e * packed.samples + i][:-1] for i in range(packed.samples)]) for e in range(2)]
    assert not np.array_equal(*epochs)
    total = manifest.domains["prose"]["train"]["tokens"]
    for epoch in epochs:
        assert total - CONTEXT <= len(epoch) <= total
    documents, ends, order = packed._epoch(0)
    stream = np.concatenate([packed._data[int(d)] for d in documents])
    assert np.array_equal(packed[5], stream[order[5] * CONTEXT : order[5] * CONTEXT + CONTEXT + 1])


def collect(out: Path, world: int, micro: int, batches: int, position: int = 0, weights=None) -> torch.Tensor:
    """Global batches put together from the micro-batches of all ranks."""
    turns = 8 // (world * micro)
    loaders = [BlendedLoader(out, "train", CONTEXT, 8, r, world, micro, 1, weights, position) for r in range(world)]
    parts = [list(itertools.islice(loader, batches * turns)) for loader in loaders]
    rows = []
    for batch in range(batches):
        for turn in range(turns):
            for rank in range(world):
                part = parts[rank][batch * turns + turn]
                assert torch.equal(part["input_ids"][:, 1:], part["labels"][:, :-1])
                rows.append(torch.cat([part["input_ids"], part["labels"][:, -1:], part["domain"][:, None]], dim=1))
    assert all(loader.position == position + 8 * batches for loader in loaders)
    return torch.cat(rows)


def test_same_sequences_for_any_layout_and_after_a_resume(prepared):
    out = prepared[1]
    whole = collect(out, 1, 8, 40)
    for world, micro in ((1, 2), (2, 4), (2, 1), (4, 2)):
        assert torch.equal(collect(out, world, micro, 40), whole)
    assert torch.equal(collect(out, 2, 2, 15, position=8 * 25), whole[8 * 25 :])
    assert len({tuple(row) for row in whole[:, :CONTEXT].tolist()}) > 100


def test_weights(prepared):
    out, manifest = prepared[1], prepared[2]
    domains = collect(out, 1, 8, 256)[:, -1]
    tokens = torch.tensor([manifest.domains[d]["train"]["tokens"] for d in sorted(manifest.domains)], dtype=torch.float)
    found = torch.bincount(domains, minlength=3) / len(domains)
    torch.testing.assert_close(found, tokens / tokens.sum(), atol=0.005, rtol=0)
    domains = collect(out, 1, 8, 128, weights={"code": 3, "prose": 1})[:, -1]
    assert torch.bincount(domains, minlength=3).tolist() == [768, 0, 256]
    with pytest.raises(DataError, match="names the domain 'prosa'"):
        collect(out, 1, 8, 1, weights={"prosa": 1.0})


def test_validation_batches(prepared):
    batches = validation_batches(prepared[1], CONTEXT, 4)
    assert set(batches) <= {"code", "notes", "prose"} and "prose" in batches
    inputs, labels = batches["prose"]
    assert inputs.shape[1] == CONTEXT and len(inputs) <= 4 and torch.equal(inputs[:, 1:], labels[:, :-1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b'{"text": "fine"}\n{"text": "bad \xff"}\n', "line 2: not UTF-8"),
        (b'{"text": "fine"}\n{"body": "x"}\n', r"line 2: no text under \"text\" \(found: \['body'\]\)"),
        (b'{"text": "fine"}\n{"text": \n', "line 2: no JSON"),
        (b"\n\n", "no document"),
        (b'{"text": "  "}\n', "no document with text"),
    ],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_corpus(tmp_path)


def test_bad_folders_and_sizes(tmp_path, prepared):
    with pytest.raises(DataError, match="is no folder"):
        read_corpus(tmp_path / "none")
    with pytest.raises(DataError, match="holds no DOMAIN"):
        read_corpus(tmp_path)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 500)[:-12])
    with pytest.raises(DataError, match="cut.jsonl.gz cannot be read"):
        read_corpus(tmp_path)
    with pytest.raises(DataError, match=r"vocab_size = 20000 is more than the corpus allows: at most \d+"):
        train_tokenizer(read_corpus(prepared[0]), tmp_path / "t.model", 20000)
    with pytest.raises(DataError, match="no such tokenizer"):
        Tokenizer(tmp_path / "t.model")
    (tmp_path / "t.model").write_bytes(b"no model")
    with pytest.raises(DataError, match="no sentencepiece model"):
        Tokenizer(tmp_path / "t.model")
    with pytest.raises(DataError, match="fewer than one sequence"):
        BlendedLoader(prepared[1], "train", 100_000, 8, 0, 1, 8)
    with pytest.raises(DataError, match="no multiple of 3 ranks x 2"):
        BlendedLoader(prepared[1], "train", CONTEXT, 8, 0, 3, 2)
    with pytest.raises(DataError, match="no manifest.json"):
        BlendedLoader(tmp_path, "train", CONTEXT, 8, 0, 1, 8)


def test_a_failing_write_keeps_what_was_there(prepared, tmp_path, monkeypatch):
    corpus, out, manifest = prepared
    from mocte_ds.data import indexed as module

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_domain", full)
    with pytest.raises(DataError, match="No space left on device.*untouched"):
        prepare(corpus, out, out / "tokenizer.model", 0.2, workers=1, progress=False)
    assert Manifest.read(out) == manifest and not out.with_name("out.tmp").exists()
