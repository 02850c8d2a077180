"""A sentencepiece tokenizer: trained on a corpus, lossless on any text."""

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import sentencepiece

from mocte_ds.data.corpus import read_corpus
from mocte_ds.errors import DataError
from mocte_ds.ownership import put, require_apart, require_ours
from mocte_ds.shown import one_line

TOOL = "train_tokenizer"
SAMPLE_CHARACTERS = 8_000_000
# Sentencepiece writes spaces as this character and would turn the character itself into a space.
_SPACE_MARK = "\u2581"


def train_tokenizer(
    corpus: str | Path | Mapping[str, Iterable[str]],
    out: str | Path,
    vocab_size: int,
    model_type: str = "bpe",
    seed: int = 0,
) -> Path:
    """Train and store a tokenizer.

    Args:
        corpus: folder of a corpus, or texts by domain (see :func:`mocte_ds.data.read_corpus`).
        out: file to write, by custom NAME.model.
        vocab_size: number of pieces; the 256 bytes and 4 special ones (<unk> 0, <s> 1, </s> 2, <pad> 3) count.
        model_type: `bpe` or `unigram`.
        seed: of the choice of documents where the corpus has more than 8 million characters.

    Returns:
        ``out``.

    Raises:
        DataError: a bad corpus, no text, more or fewer pieces than the text allows (the message names the limit), or
            ``out`` cannot be written.
        NotOurs: ``out`` is a file of somebody else, or lies in the corpus.
    """
    out = Path(out)
    if not isinstance(corpus, Mapping):
        require_apart(out, Path(corpus))
    texts = corpus if isinstance(corpus, Mapping) else read_corpus(corpus)
    lines = list(_sample_lines(texts, seed))
    if not lines:
        raise DataError("the corpus holds no text to train a tokenizer on.")
    require_ours(out.parent, [out.name], TOOL)
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
        raise DataError(_advice(vocab_size, str(error))) from error
    try:
        put(out.parent, {out.name: model.getvalue()}, TOOL)
    except OSError as error:
        raise DataError(
            f"could not write {out}: {error.strerror or error}; make room or choose another place."
        ) from error
    return out


class Tokenizer:
    """A stored sentencepiece model."""

    def __init__(self, path: str | Path) -> None:
        """Load it.

        Raises:
            DataError: no such file, no sentencepiece model, or a model without </s>.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"{path}: no such tokenizer; tools/train_tokenizer.py makes one.")
        try:
            content = self.path.read_bytes()
            if not content:
                raise ValueError("the file is empty")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except Exception as error:
            raise DataError(f"{path} is not a sentencepiece model: {one_line(error)}") from error
        self.sha256 = hashlib.sha256(content).hexdigest()
        """Hash of the model file."""
        if self.eod_id < 0:
            raise DataError(f"{path} has no piece </s>, which has to end every document; train one with it.")
        mark = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode("utf-8")]
        self._mark = mark if all(self._model.is_byte(piece) for piece in mark) else []

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._model.vocab_size()

    @property
    def eod_id(self) -> int:
        """Id of </s>, which ends every document."""
        return self._model.eos_id()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special pieces."""
        if _SPACE_MARK not in text or not self._mark:
            return self._model.encode(text)
        first, *others = text.split(_SPACE_MARK)
        ids = self._model.encode(first)
        for part in others:
            ids += self._mark + self._model.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text again, exactly (for a model trained by :func:`train_tokenizer`)."""
        return self._model.decode(ids)


def _advice(vocab_size: int, message: str) -> str:
    """What to do about an error of sentencepiece's trainer."""
    largest = re.search(r"<= (\d+)\.", message)
    if largest:
        return (
            f"vocab_size = {vocab_size} is more than the corpus allows: at most {largest.group(1)} are possible with "
            "it; take that or add text."
        )
    smallest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if smallest:
        return (
            f"vocab_size = {vocab_size} is too small: the 256 bytes, 4 special pieces and the characters of this "
            f"corpus need {smallest.group(1)} already."
        )
    return f"no tokenizer with vocab_size = {vocab_size} could be trained: {one_line(message)}"


def _sample_lines(corpus: Mapping[str, Iterable[str]], seed: int) -> Iterator[str]:
    """Lines to learn pieces from: everything, or equal shares of the domains where there is more than enough."""
    share = SAMPLE_CHARACTERS // max(1, len(corpus))
    for domain in sorted(corpus):
        for text in _sample(corpus[domain], share, f"{seed}/{domain}/"):
            for line in text.split("\n"):
                # Sentencepiece drops what is longer than max_sentence_length bytes.
                for start in range(0, len(line), 4000):
                    yield line[start : start + 4000]


def _sample(texts: Iterable[str], characters: int, salt: str) -> list[str]:
    """Documents with the smallest hashes that together have at least so many characters (all, if there are fewer).

    One pass over the texts; no more of them is held than is returned.
    """
    kept: list[tuple[int, int, str]] = []
    size = 0
    for number, text in enumerate(texts):
        digest = hashlib.blake2b((salt + text).encode("utf-8"), digest_size=8).digest()
        heapq.heappush(kept, (-int.from_bytes(digest), -number, text))
        size += len(text)
        while size - len(kept[0][2]) >= characters:
            size -= len(heapq.heappop(kept)[2])
    return [text for _, _, text in sorted(kept, reverse=True)]
