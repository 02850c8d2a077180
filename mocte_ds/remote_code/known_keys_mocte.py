"""The routing keys of this package by their names, in training and in an exported model; needs torch alone."""

from .keys_mocte import HashKey, Key, LinearKey, PrefixKey, PreviousKey, RandomKey, TypeKey
from .online_key_mocte import OnlineKey
from .pair_keys_mocte import PairHashKey, PairKey

KEYS: dict[str, type[Key]] = {
    "token": LinearKey,
    "online": OnlineKey,
    "type": TypeKey,
    "pair": PairKey,
    "prefix": PrefixKey,
    "previous": PreviousKey,
    "hash": HashKey,
    "pair-hash": PairHashKey,
    "random": RandomKey,
}
"""The keys by their names in configs."""
