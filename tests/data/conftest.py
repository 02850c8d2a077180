"""A small corpus of three domains in three formats, prepared once for all tests of the data pipeline."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from mocte_ds.data import Manifest, prepare, train_tokenizer


def write_lines(path: Path, texts: list[str]) -> Path:
    """Store texts as JSON lines, compressed if the name ends in .gz."""
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode("utf-8")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Prose (one document longer than any context of the tests), code with tabs and non-Latin text, short notes."""
    folder = tmp_path_factory.mktemp("corpus")
    words = "the a of river stone light over under bright dark moves falls".split()
    generator = np.random.default_rng(0)
    prose = [" ".join(generator.choice(words, 60)) + "." for _ in range(120)]
    prose.append(" ".join(generator.choice(words, 3000)))
    write_lines(folder / "prose.jsonl.gz", prose)
    code = [f"def f{n}(x):\n\treturn x  +  {n}\n\n# größe 日本 \u2581\n" * 6 for n in range(60)]
    write_lines(folder / "code.jsonl", code)
    notes = "\n\n".join(f"note {n} about\nstone and light" for n in range(80))
    (folder / "notes.txt").write_text(notes, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(corpus, tmp_path_factory) -> Path:
    """A tokenizer of 340 pieces, trained on the small corpus."""
    return train_tokenizer(corpus, tmp_path_factory.mktemp("tokenizer") / "small.model", 340)


@pytest.fixture(scope="session")
def prepared(corpus, tokenizer, tmp_path_factory) -> tuple[Path, Manifest]:
    """The small corpus, prepared; not to be changed by a test."""
    out = tmp_path_factory.mktemp("prepared") / "out"
    manifest, made = prepare(corpus, out, tokenizer, 0.1, workers=1, progress=False)
    assert made
    return out, manifest
