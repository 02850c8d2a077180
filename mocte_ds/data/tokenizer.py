"""A sentencepiece tokenizer: trained on a corpus, lossless on any text."""

import hashlib
import io
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import sentencepiece

from mocte_ds.errors import DataError

SAMPLE_BYTES = 8_000_000


def train_tokenizer(
    corpus: Mapping[str, Iterable[str]], out: str | Path, vocab_size: int, model_type: str = "bpe", seed: int = 0
) -> Path:
    """Train and store a tokenizer.

    Args:
        corpus: texts by domain (see :func:`mocte_ds.data.read_corpus`).
        out: file to write, by custom NAME.model.
        vocab_size: pieces, 256 bytes and 4 special ones (<unk> 0, <s> 1, </s> 2, <pad> 3) included.
        model_type: `bpe` or `unigram`.
        seed: of the choice of text where the corpus is larger than 8 MB.

    Returns:
        ``out``.

    Raises:
        DataError: no text, or more pieces asked for than the text allows (names the largest possible number).
    """
    if vocab_size < 300:
        raise DataError(f"vocab_size = {vocab_size} is too small: 256 bytes and 4 special pieces come first; take 300 or more.")
    lines = list(_sample_lines(corpus, seed))
    if not lines:
        raise DataError("the corpus holds no text to train a tokenizer on.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            # Lossless: nothing is normalised, stripped or dropped, and what has no piece becomes bytes.
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=16384,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        largest = re.search(r"<= (\d+)", str(error))
        advice = f"at most {largest.group(1)} are possible with this corpus" if largest else str(error).splitlines()[0]
        raise DataError(f"vocab_size = {vocab_size} is more than the corpus allows: {advice}.") from error
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    pending = out.with_suffix(out.suffix + ".tmp")
    pending.write_bytes(model.getvalue())
    os.replace(pending, out)
    return out


class Tokenizer:
    """A stored sentencepiece model."""

    def __init__(self, path: str | Path) -> None:
        """Load it.

        Raises:
            DataError: no such file, or no sentencepiece model.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{path}: no such tokenizer; tools/train_tokenizer.py makes one.")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            raise DataError(f"{path} is no sentencepiece model: {str(error).splitlines()[0]}") from error

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._model.vocab_size()

    @property
    def eod_id(self) -> int:
        """Id of </s>, which ends every document."""
        return self._model.eos_id()

    @property
    def sha256(self) -> str:
        """Hash of the model file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special pieces."""
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text again, exactly."""
        return self._model.decode(ids)


def _sample_lines(corpus: Mapping[str, Iterable[str]], seed: int) -> Iterator[str]:
    """Lines of the corpus; equal shares of all domains where there is more than enough."""
    share = SAMPLE_BYTES // max(1, len(corpus))
    for domain in sorted(corpus):
        texts = list(corpus[domain])
        random.Random(f"{seed}/{domain}").shuffle(texts)
        size = 0
        for text in texts:
            for line in text.split("\n"):
                # Sentencepiece drops what is longer than max_sentence_length.
                for start in range(0, len(line), 4000):
                    yield line[start : start + 4000]
            size += len(text.encode("utf-8", errors="ignore"))
            if size > share:
                break
