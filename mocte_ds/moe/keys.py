"""Routing keys by their names in a config; a new one is a class like those, here or in a user's script.

docs/extending.md shows how. The classes of this package travel with exported models, and so lie in
mocte_ds/remote_code/. The config, the birth of experts, the FLOPs ledger and the export ask the class.
"""

from mocte_ds.registry import KEYS
from mocte_ds.remote_code.document_key_mocte import DocumentKey
from mocte_ds.remote_code.keys_mocte import (
    HashKey,
    Key,
    LinearKey,
    PrefixKey,
    PreviousKey,
    RandomKey,
    TableKey,
    TypeKey,
)
from mocte_ds.remote_code.known_keys_mocte import KEYS as KNOWN
from mocte_ds.remote_code.online_key_mocte import OnlineKey
from mocte_ds.remote_code.pair_keys_mocte import PairHashKey, PairKey
from mocte_ds.remote_code.tokens_mocte import RoutingError, Tokens

__all__ = [
    "BUILT_IN",
    "KEYS",
    "DocumentKey",
    "HashKey",
    "Key",
    "LinearKey",
    "OnlineKey",
    "PairHashKey",
    "PairKey",
    "PrefixKey",
    "PreviousKey",
    "RandomKey",
    "RoutingError",
    "TableKey",
    "Tokens",
    "TypeKey",
    "key_class",
]

BUILT_IN: dict[str, type[Key]] = dict(KNOWN)
"""The keys of this package by their names."""
for _name, _key in BUILT_IN.items():
    KEYS.register(_name)(_key)
# Exported models that are loaded in this process find registered keys, too.
KEYS.keep_in(KNOWN)


def key_class(kind: str) -> type[Key]:
    """The class of a routing key by its name in the config.

    Raises:
        ConfigError: no such key.
    """
    return KEYS.get(kind, "router.kind")
