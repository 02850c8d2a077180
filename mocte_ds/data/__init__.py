"""From raw text to batches: corpus, tokenizer, indexed data, loader."""

from mocte_ds.data.corpus import embedded_corpus, read_corpus
from mocte_ds.data.loader import BlendedLoader, validation_batches
from mocte_ds.data.indexed import Manifest, prepare
from mocte_ds.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "BlendedLoader",
    "Manifest",
    "Tokenizer",
    "embedded_corpus",
    "prepare",
    "read_corpus",
    "train_tokenizer",
    "validation_batches",
]
