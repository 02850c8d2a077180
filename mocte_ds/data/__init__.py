"""From raw text to batches: corpus, tokenizer, indexed data, loader."""

from mocte_ds.data.corpus import Documents, embedded_corpus, read_corpus
from mocte_ds.data.indexed import prepare
from mocte_ds.data.loader import BlendedLoader, validation_batches
from mocte_ds.data.manifest import Manifest
from mocte_ds.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "BlendedLoader",
    "Documents",
    "Manifest",
    "Tokenizer",
    "embedded_corpus",
    "prepare",
    "read_corpus",
    "train_tokenizer",
    "validation_batches",
]
