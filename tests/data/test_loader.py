"""The loader: the same sequences for any layout and after a resume, whole epochs, weights, and clear refusals."""

import itertools
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from mocte_ds.data import BlendedLoader, prepare, train_tokenizer, validation_batches
from mocte_ds.data.loader import PackedDomain
from mocte_ds.errors import DataError
from tests.data.conftest import write_lines

CONTEXT = 32


def documents_of(folder: Path, domain: str, split: str = "train") -> list[tuple[int, ...]]:
    data = IndexedDataset(str(folder / f"{domain}_{split}"))
    return [tuple(data[i].tolist()) for i in range(len(data))]


def collect(out: Path, world: int, micro: int, batches: int, position: int = 0, weights=None, seed=1) -> torch.Tensor:
    """Global batches put together from the micro-batches of all ranks: (8 * batches, context + 2), domain last."""
    turns = 8 // (world * micro)
    loaders = [BlendedLoader(out, "train", CONTEXT, 8, r, world, micro, seed, weights, position) for r in range(world)]
    parts = [list(itertools.islice(loader, batches * turns)) for loader in loaders]
    rows = []
    for batch in range(batches):
        for turn in range(turns):
            for rank in range(world):
                part = parts[rank][batch * turns + turn]
                assert part["input_ids"].shape == part["labels"].shape == (micro, CONTEXT)
                assert part["domain"].shape == (micro,)
                assert all(tensor.dtype == torch.int64 for tensor in part.values())
                assert torch.equal(part["input_ids"][:, 1:], part["labels"][:, :-1])
                rows.append(torch.cat([part["input_ids"], part["labels"][:, -1:], part["domain"][:, None]], dim=1))
    assert all(loader.position == position + 8 * batches for loader in loaders)
    return torch.cat(rows)


def test_same_sequences_for_any_layout_and_after_a_resume(prepared):
    out, _ = prepared
    whole = collect(out, 1, 8, 40)
    for world, micro in ((1, 2), (2, 4), (2, 1), (4, 2), (4, 1)):
        assert torch.equal(collect(out, world, micro, 40), whole)
    assert torch.equal(collect(out, 2, 2, 15, position=8 * 25), whole[8 * 25 :])
    assert len({tuple(row) for row in whole[:, :CONTEXT].tolist()}) > 100
    assert not torch.equal(collect(out, 1, 8, 40, seed=2), whole)


def test_position_moves_with_the_last_micro_batch(prepared):
    loader = BlendedLoader(prepared[0], "train", CONTEXT, 8, 0, 1, 2, seed=1)
    batches = iter(loader)
    seen = [(next(batches), loader.position)[1] for _ in range(9)]
    assert seen == [0, 0, 0, 8, 8, 8, 8, 16, 16]
    loader.seek(800)
    first = next(iter(loader))
    again = BlendedLoader(prepared[0], "train", CONTEXT, 8, 0, 1, 2, seed=1, position=800)
    assert torch.equal(first["labels"], next(iter(again))["labels"])


def test_epochs_hold_every_document_and_differ(prepared):
    """Cut at the ends of documents, an epoch in its own order gives back the documents."""
    out, manifest = prepared
    packed = PackedDomain(out, manifest, "prose", "train", CONTEXT, seed=3)
    documents = Counter(documents_of(out, "prose"))
    longest = max(documents, key=len)
    assert len(longest) > 20 * CONTEXT  # a document longer than the context is cut over sequences
    streams = []
    for epoch in range(3):
        order = packed._epoch(epoch)[2]
        places = {int(place): epoch * packed.samples + i for i, place in enumerate(order)}
        rows = [packed[places[i]] for i in range(packed.samples)]
        assert all(row[-1] == after[0] for row, after in itertools.pairwise(rows))
        stream = np.concatenate([row[:-1] for row in rows]).tolist()
        total = manifest.domains["prose"]["train"]["tokens"]
        assert total - CONTEXT - 1 <= len(stream) < total
        ends = [i + 1 for i, token in enumerate(stream) if token == manifest.eod_id]
        found = Counter(tuple(stream[a:b]) for a, b in itertools.pairwise([0, *ends]))
        rest = documents - found
        assert found - documents == Counter() and sum(len(d) * n for d, n in rest.items()) == total - ends[-1]
        streams.append(stream)
    assert streams[0] != streams[1] != streams[2]


def test_batches_over_several_epochs_are_text_of_their_domain(prepared):
    out, manifest = prepared
    rows = collect(out, 1, 8, 150).tolist()  # 1,200 sequences; "notes" has 40 in an epoch
    loader = BlendedLoader(out, "train", CONTEXT, 8, 0, 1, 8)
    documents = {number: documents_of(out, domain) for number, domain in enumerate(loader.domains)}
    texts = {number: [",".join(map(str, d)) for d in found] for number, found in documents.items()}
    whole = {number: set(found) for number, found in texts.items()}
    counts = Counter(row[-1] for row in rows)
    assert counts[loader.domains.index("notes")] > 1.2 * manifest.domains["notes"]["train"]["tokens"] / CONTEXT
    for *tokens, domain in rows[::7]:
        ends = [i + 1 for i, token in enumerate(tokens) if token == manifest.eod_id]
        pieces = [",".join(map(str, tokens[a:b])) for a, b in itertools.pairwise([0, *ends, len(tokens)])]
        if not ends:
            assert any(pieces[0] in text for text in texts[domain])
            continue
        first, *inner, last = pieces
        assert any(text.endswith(first) for text in texts[domain])
        assert all(piece in whole[domain] for piece in inner)
        assert any(text.startswith(last) for text in texts[domain])


def test_orders_are_computed_once_an_epoch(prepared, monkeypatch):
    loader = BlendedLoader(prepared[0], "train", CONTEXT, 8, 0, 1, 8)
    made = []
    original = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: made.append(tuple(key)) or original(key))
    samples = sum(packed.samples for packed in loader._sets.values())
    for number in range(samples):
        loader.sequence(number)
    assert len(made) == len(set(made)) <= samples // 1024 + 1 + 2 * len(loader.domains)


def test_weights(prepared):
    out, manifest = prepared
    domains = collect(out, 1, 8, 256)[:, -1]
    tokens = torch.tensor([manifest.domains[d]["train"]["tokens"] for d in sorted(manifest.domains)], dtype=torch.float)
    found = torch.bincount(domains, minlength=3) / len(domains)
    torch.testing.assert_close(found, tokens / tokens.sum(), atol=0.002, rtol=0)
    domains = collect(out, 1, 8, 128, weights={"code": 3, "prose": 1})[:, -1]
    assert torch.bincount(domains, minlength=3).tolist() == [768, 0, 256]
    domains = collect(out, 1, 8, 128, weights={"code": 1e6, "prose": 1, "notes": 0})[:, -1]
    assert torch.bincount(domains, minlength=3).tolist() == [1023, 0, 1]  # a weight above 0 is never rounded to nothing
    for weights, message in (
        ({"prosa": 1.0}, "names the domain 'prosa'"),
        ({"prose": -1.0, "code": 2.0}, "must be positive"),
        ({"prose": float("nan")}, "must be positive"),
        ({"prose": 0.0}, "must be positive"),
    ):
        with pytest.raises(DataError, match=message):
            collect(out, 1, 8, 1, weights=weights)


def test_validation_batches(prepared):
    out, manifest = prepared
    batches = validation_batches(out, CONTEXT, 4)
    assert set(batches) == {"code", "notes", "prose"}
    held = [token for document in documents_of(out, "prose", "validation") for token in document]
    for domain, (inputs, labels) in batches.items():
        assert inputs.shape == labels.shape and inputs.shape[1] == CONTEXT and 1 <= len(inputs) <= 4
        assert torch.equal(inputs[:, 1:], labels[:, :-1])
        again = validation_batches(out, CONTEXT, 4)[domain]
        assert torch.equal(again[0], inputs)
    assert set(batches["prose"][0].flatten().tolist()) <= set(held)
    short = min(manifest.domains, key=lambda d: manifest.domains[d]["validation"]["tokens"])
    size = manifest.domains[short]["validation"]["tokens"]
    with pytest.warns(UserWarning, match=f"'{short}' is not validated: its {size} tokens"):
        assert set(validation_batches(out, size, 4)) == set(batches) - {short}
    with pytest.warns(UserWarning), pytest.raises(DataError, match="no domain of"):
        validation_batches(out, 100_000, 4)


def test_a_domain_shorter_than_the_context(tmp_path, corpus, tokenizer):
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    write_lines(folder / "tiny.jsonl", ["stone", "light"])
    prepare(folder, tmp_path / "out", tokenizer, 0.1, workers=1, progress=False)
    with pytest.raises(DataError, match="domain 'tiny' .* fewer than one sequence of 32 .*weight 0"):
        BlendedLoader(tmp_path / "out", "train", CONTEXT, 8, 0, 1, 8)
    collect(tmp_path / "out", 1, 8, 2, weights={"prose": 1, "tiny": 0})


def test_refusals(prepared, tmp_path, corpus):
    out = prepared[0]
    with pytest.raises(DataError, match="fewer than one sequence"):
        BlendedLoader(out, "train", 100_000, 8, 0, 1, 8)
    with pytest.raises(DataError, match="not a multiple of 3 ranks x 2"):
        BlendedLoader(out, "train", CONTEXT, 8, 0, 3, 2)
    with pytest.raises(DataError, match="rank = 2 must be one of the 2"):
        BlendedLoader(out, "train", CONTEXT, 8, 2, 2, 2)
    with pytest.raises(DataError, match="micro_batch = 0"):
        BlendedLoader(out, "train", CONTEXT, 8, 0, 1, 0)
    with pytest.raises(DataError, match="seed = -1"):
        BlendedLoader(out, "train", CONTEXT, 8, 0, 1, 8, seed=-1)
    with pytest.raises(DataError, match="position = -8"):
        BlendedLoader(out, "train", CONTEXT, 8, 0, 1, 8, position=-8)
    with pytest.raises(DataError, match="no manifest.json"):
        BlendedLoader(tmp_path, "train", CONTEXT, 8, 0, 1, 8)

    def damaged(name: str, content: bytes, message: str) -> None:
        copy = shutil.copytree(out, tmp_path / name)
        (copy / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            BlendedLoader(copy, "train", CONTEXT, 8, 0, 1, 8)

    damaged("code_train.bin", (out / "code_train.bin").read_bytes()[:-2], "tokens and .* bytes, manifest.json tells")
    damaged("code_train.idx", (out / "prose_train.idx").read_bytes(), "code_train.idx has .* bytes instead of")
    damaged("prose_train.idx", b"MMIDIDX", "prose_train.idx has 7 bytes instead of")
    other = train_tokenizer(corpus, tmp_path / "other.model", 350)
    damaged("tokenizer.model", other.read_bytes(), "is not the tokenizer that the data was prepared with")
    copy = shutil.copytree(out, tmp_path / "copy")
    (copy / "notes_train.bin").unlink()
    with pytest.raises(DataError, match="notes_train.bin is missing"):
        BlendedLoader(copy, "train", CONTEXT, 8, 0, 1, 8)
