"""Turns documents into token ids and signatures, by several processes where there is enough text."""

import contextlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from mocte_ds.data.signatures import Signatures
from mocte_ds.data.stored_tokenizer import AnyTokenizer, open_tokenizer
from mocte_ds.data.verify import require_ids, token_type
from mocte_ds.errors import DataError


@dataclass(frozen=True)
class Encoded:
    """Some documents, n of them."""

    tokens: np.ndarray
    """Ids of all documents, each with its end, in the type in which they are stored."""
    lengths: np.ndarray
    """(n,) int32 tokens of each."""
    signatures: Signatures

    @classmethod
    def joined(cls, parts: list["Encoded"], vocab_size: int) -> "Encoded":
        """All documents, in order."""
        return cls(
            np.concatenate([np.empty(0, dtype=token_type(vocab_size)), *(part.tokens for part in parts)]),
            np.concatenate([np.empty(0, dtype=np.int32), *(part.lengths for part in parts)]),
            Signatures.joined([part.signatures for part in parts]),
        )


Encoder = Callable[[Iterable[tuple[list[str], int]]], Iterator[Encoded]]
"""From lists of texts, each with the halvings of :meth:`mocte_ds.data.signatures.Signatures.of`, to what they give, in
order."""


@contextlib.contextmanager
def encoder(tokenizer: AnyTokenizer, workers: int) -> Iterator[Encoder]:
    """An encoder, by other processes where ``workers`` is more than 1; they start when there is something to do.

    It raises DataError for a document that does not fit into memory, or gets ids outside of the vocabulary.
    """
    if workers == 1:
        yield lambda parts: (_encoded(tokenizer, texts, halvings) for texts, halvings in parts)
        return
    context = multiprocessing.get_context("spawn")  # fork and the threads of PyTorch do not go together
    with ProcessPoolExecutor(workers, context, _start_worker, (str(tokenizer.path),)) as pool:

        def encode(parts: Iterable[tuple[list[str], int]]) -> Iterator[Encoded]:
            waiting: deque[Future[Encoded]] = deque()
            for texts, halvings in parts:
                waiting.append(pool.submit(_encode_part, texts, halvings))
                if len(waiting) > 3 * workers:  # enough to keep all busy, little enough for the memory
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        yield encode


def _encoded(tokenizer: AnyTokenizer, texts: list[str], halvings: int) -> Encoded:
    ids = [_ids(tokenizer, text) for text in texts]
    lengths = np.asarray([len(one) for one in ids], dtype=np.int32)
    tokens = np.concatenate([np.empty(0, dtype=token_type(tokenizer.vocab_size)), *ids])
    return Encoded(tokens, lengths, Signatures.of(texts, halvings))


def _ids(tokenizer: AnyTokenizer, text: str) -> np.ndarray:
    """Token ids of a document and its end: (n + 1,)."""
    try:
        ids = np.asarray([*tokenizer.encode(text), tokenizer.eod_id], dtype=np.int32)
    except MemoryError:
        raise DataError(
            f"a document of {len(text):,} characters, which begins {text[:40]!r}, does not fit into memory while it is "
            "tokenised; cut it into several documents."
        ) from None
    require_ids(ids, tokenizer.vocab_size, f"the text that begins {text[:40]!r}, by the tokenizer {tokenizer.path},")
    return ids.astype(token_type(tokenizer.vocab_size))


_worker: AnyTokenizer


def _start_worker(path: str) -> None:
    global _worker
    _worker = open_tokenizer(path)


def _encode_part(texts: list[str], halvings: int) -> Encoded:
    return _encoded(_worker, texts, halvings)
