"""Names that a config may use for classes and functions, the user's own among them."""

from collections.abc import Callable
from typing import Generic, TypeVar

from mocte_ds.errors import ConfigError
from mocte_ds.shown import nearest, shown

Item = TypeVar("Item")


class Registry(Generic[Item]):
    """Items by name, in the order of their registration."""

    def __init__(self, what: str) -> None:
        """Empty.

        Args:
            what: what the items are, for messages, e.g. "freeze policy".
        """
        self.what = what
        self._items: dict[str, Item] = {}

    def register(self, name: str) -> Callable[[Item], Item]:
        """Decorator that adds an item.

        Raises:
            ConfigError: the name is taken by another item. The same item, from a module that is loaded again, replaces
                the old one.
        """

        def add(item: Item) -> Item:
            old = self._items.get(name)
            if old is not None and _origin(old) != _origin(item):
                raise ConfigError(
                    f"there is already a {self.what} named {name!r} ({_origin(old)}); choose another name."
                )
            self._items[name] = item
            return item

        return add

    def get(self, name: str, where: str) -> Item:
        """The item of that name.

        Args:
            name: as a config has it.
            where: path of the key in the config, for the message.

        Raises:
            ConfigError: no such item; with the nearest name.
        """
        if name not in self._items:
            raise ConfigError(f"{where} = {shown(name)} is not one of {self.names()}.{nearest(name, self._items)}")
        return self._items[name]

    def names(self) -> list[str]:
        """All names."""
        return list(self._items)


def _origin(item: object) -> str:
    item = getattr(item, "test", item)
    return f"{getattr(item, '__module__', '?')}.{getattr(item, '__qualname__', item)}"
