"""Names that a config may use for classes and functions, the user's own among them."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from mocte_ds.errors import ConfigError
from mocte_ds.shown import nearest, shown

Item = TypeVar("Item")


class Registry(Generic[Item]):
    """Items by name, in the order of their registration."""

    def __init__(self, what: str, built_in: str | None = None, others: Sequence[str] = ()) -> None:
        """Empty.

        Args:
            what: what the items are, for messages, e.g. "freeze policy".
            built_in: module that registers the items of this package; it is imported at the first look-up, so that the
                config can name items of packages that read the config.
            others: names that the config knows and no item may have.
        """
        self.what, self._built_in, self._others = what, built_in, list(others)
        self._items: dict[str, Item] = {}
        self._places: dict[str, str] = {}

    def register(self, name: str, origin: object = None) -> Callable[[Item], Item]:
        """Decorator that adds an item.

        Args:
            name: in the config.
            origin: the class or function that was written for it; None: the item itself.

        Raises:
            ConfigError: the name is taken. The same class or function out of a module that is loaded again replaces the
                old one.
        """

        def add(item: Item) -> Item:
            place = _place(item if origin is None else origin)
            old = self._places.get(name)
            if name in self._others or (old is not None and old != place):
                raise ConfigError(
                    f"there is already a {self.what} {name!r} ({old or 'built in'}); choose another name."
                )
            self._items[name], self._places[name] = item, place
            return item

        return add

    def keep_in(self, items: dict[str, Item]) -> None:
        """Keep the items in a mapping that others look into; it gets those that are registered so far."""
        items.update(self._items)
        self._items = items

    def get(self, name: str, where: str) -> Item:
        """The item of that name.

        Args:
            name: as a config has it.
            where: path of the key in the config, for the message.

        Raises:
            ConfigError: no such item; with the nearest name.
        """
        if self._built_in:
            importlib.import_module(self._built_in)
        if name not in self._items:
            names = [*self._items, *self._others]
            raise ConfigError(
                f"{where} = {shown(name)} is not one of {names}.{nearest(name, names)} If it is your own {self.what}, "
                "import the module that registers it first; for a command line: --import FILE."
            )
        return self._items[name]


def _place(item: object) -> str:
    return f"{getattr(item, '__module__', '?')}.{getattr(item, '__qualname__', item)}"


OFF = "off"
"""The freeze policy that never freezes."""
KEYS: Registry[Any] = Registry("routing key", "mocte_ds.moe.keys")
"""Classes derived from :class:`mocte_ds.moe.keys.Key`."""
POLICIES: Registry[Any] = Registry("freeze policy", "mocte_ds.trainability.rules", others=[OFF])
"""Each a :class:`mocte_ds.trainability.policy.Rule`."""
