"""Data prepared with the tokenizer of a Hugging Face folder: its ids, its end token, and what is refused."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mocte_ds.data import Manifest, prepare, train_tokenizer
from mocte_ds.data.hf_tokenizer import HFTokenizer
from mocte_ds.data.manifest import open_indexed
from mocte_ds.data.stored_tokenizer import open_tokenizer, tokenizer_in
from mocte_ds.errors import DataError

TEXT = "the cat sat on the mat, größe 日本語 \n\tx = 1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer with three special tokens that cuts and pads, as some folders say."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<bos>", "<eos>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT] * 9, trainer)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path / "folder")
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "folder" / "tokenizer.json"))
    return tmp_path / "folder"


def test_ids_are_those_of_transformers(folder: Path) -> None:
    mine, theirs = HFTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = theirs.encode(TEXT, add_special_tokens=False, truncation=False, padding=False)
    assert mine.encode(TEXT) == ids and len(ids) > 5 and mine.decode(ids) == TEXT
    assert mine.special == {"bos": 0, "eos": 1, "pad": 2} and mine.eod_id == 1
    assert mine.vocab_size == len(theirs)
    # A text that spells the end token ends no document.
    assert 1 not in mine.encode("a <eos> b") and mine.decode(mine.encode("a <eos> b")) == "a <eos> b"
    assert open_tokenizer(folder / "tokenizer.json").sha256 == open_tokenizer(folder).sha256 == mine.sha256


def test_where_the_end_token_stands(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text())

    def end(**changes: object) -> int:
        config.write_text(json.dumps({**values, **changes}))
        return HFTokenizer(folder).eod_id

    assert end(eos_token={"content": "<pad>", "special": True}) == 2
    first = HFTokenizer(folder).sha256
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<bos>"}))
    assert end(eos_token=None) == 0
    assert HFTokenizer(folder).sha256 != first, "another end token makes other data"
    (folder / "special_tokens_map.json").unlink()
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert end(eos_token=None) == 1
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match="names no token that ends a text"):
        HFTokenizer(folder)


def test_prepared_data_changes_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "data"
    corpus.mkdir()
    lines = [json.dumps({"text": f"{TEXT} {number}"}) for number in range(40)]
    (corpus / "prose.jsonl").write_text("\n".join(lines))
    own = train_tokenizer(corpus, tmp_path / "own.model", 310)
    for path, name in ((own, "tokenizer.model"), (folder, "tokenizer"), (own, "tokenizer.model")):
        manifest, made = prepare(corpus, out, path, 0.2, workers=1, progress=False)
        assert made and tokenizer_in(out).name == name
        assert sorted(p.name for p in out.glob("tokenizer*")) == [name]
        assert Manifest.read(out).require_tokenizer(tokenizer_in(out)).sha256 == open_tokenizer(path).sha256
        assert not prepare(corpus, out, tokenizer_in(out), 0.2, workers=1, progress=False)[1]
        data, tokenizer = open_indexed(out, manifest, "prose", "train"), open_tokenizer(path)
        document = data[0].copy()  # it goes with the mapped file
        assert document[-1] == tokenizer.eod_id and tokenizer.decode(document[:-1].tolist()).startswith(TEXT)
    other = train_tokenizer(corpus, tmp_path / "other.model", 305)
    with pytest.raises(DataError, match="is not the tokenizer that the data was prepared with"):
        Manifest.read(out).require_tokenizer(other)


def test_damaged_and_missing_files(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer.json cannot be read"):
        HFTokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="has no tokenizer.json; AutoTokenizer"):
        open_tokenizer(folder)
