"""Hashes of a text's runs of 13 words: two texts that share one have copied from each other, or both from a third."""

import numpy as np

GRAM = 13
"""Words of a run, as in the contamination checks of GPT-3 (Brown et al., 2020)."""
# A text is hashed in pieces of so many bytes, so that temporary arrays stay small.
_PIECE = 1 << 20
# A byte's letter: 0 between words; capitals as small letters; what is not ASCII belongs to words.
_LETTER = np.zeros(256, dtype=np.uint64)
for _byte in (*range(0x80, 0x100), *b"abcdefghijklmnopqrstuvwxyz0123456789_"):
    _LETTER[_byte] = _byte
for _byte in range(ord("A"), ord("Z") + 1):
    _LETTER[_byte] = _byte + 32
_FACTORS = np.random.default_rng(13).integers(1, 2**63, size=GRAM + 64, dtype=np.uint64) * 2 + 1


def gram_hashes(text: str) -> np.ndarray:
    """Distinct 64-bit hashes of all runs of 13 words, upper and lower case alike; (n,) uint64, ascending.

    Words are runs of letters, digits and underscores; each Chinese, Japanese or Korean character is a word. A text of
    fewer words has one hash, of all of them; a text without words has none.
    """
    data = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    words = np.concatenate([_words(data[at : at + _PIECE]) for at in range(0, len(data), _PIECE)] or [_words(data)])
    if not len(words):
        return words
    count = max(1, len(words) - GRAM + 1)
    words = np.pad(words, (0, max(0, GRAM - len(words))))
    sums = np.zeros(count, dtype=np.uint64)
    for place in range(GRAM):
        sums += words[place : place + count] * _FACTORS[place]
    return np.unique(mixed(sums))


def _words(data: np.ndarray) -> np.ndarray:
    """(words,) uint64 hash of each word of UTF-8 bytes."""
    letters = _LETTER[data]
    inside = letters > 0
    begins = inside.copy()
    begins[1:] &= ~inside[:-1]
    wide = (data >= 0xE3) & (data <= 0xED)  # first of the three bytes of a CJK character
    begins |= wide
    begins[3:] |= wide[:-3] & inside[3:]
    starts = np.flatnonzero(begins)
    if not len(starts):
        return np.empty(0, dtype=np.uint64)
    letters, begins = letters[starts[0] :], begins[starts[0] :]
    starts -= starts[0]
    place = np.arange(len(letters)) - starts[np.cumsum(begins) - 1]
    return mixed(np.add.reduceat(letters * _FACTORS[GRAM + place % 64], starts))


def mixed(values: np.ndarray) -> np.ndarray:
    """All bits of a number spread over all bits (the last steps of SplitMix64; Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
