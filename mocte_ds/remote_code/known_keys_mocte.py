"""The routing keys by their names, in training and in an exported model; needs torch alone.

The file of a key of the user's own finds here what it takes from mocte_ds.moe.keys in training.
"""

from collections.abc import Callable
from typing import TypeVar

from .document_key_mocte import DocumentKey
from .keys_mocte import HashKey, Key, LinearKey, PrefixKey, PreviousKey, RandomKey, TableKey, TypeKey
from .online_key_mocte import OnlineKey
from .pair_keys_mocte import PairHashKey, PairKey
from .tokens_mocte import RoutingError, Tokens

__all__ = [
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
]

AKey = TypeVar("AKey", bound=type[Key])


class Keys(dict[str, type[Key]]):
    """Classes of keys by their names in configs."""

    def register(self, name: str) -> Callable[[AKey], AKey]:
        """Decorator that adds a class under a name."""

        def add(key: AKey) -> AKey:
            self[name] = key
            return key

        return add

    def __missing__(self, name: str) -> type[Key]:
        raise RoutingError(
            f"the routing key {name!r} is not known here: it is of the script that trained the model. Load the folder "
            "with trust_remote_code=True, which takes the key's file from there, or import the file that registers it."
        )


KEYS = Keys(
    {
        "token": LinearKey,
        "online": OnlineKey,
        "type": TypeKey,
        "pair": PairKey,
        "prefix": PrefixKey,
        "document": DocumentKey,
        "previous": PreviousKey,
        "hash": HashKey,
        "pair-hash": PairHashKey,
        "random": RandomKey,
    }
)
"""Those of this package, and any that are registered."""
