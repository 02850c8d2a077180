"""Scripts that call deepspeed.initialize get blocks where their config has a "mocte" block: install(), uninstall()."""

import base64
import contextlib
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hjson

from mocte_ds.errors import MocteError

Initialize = Callable[..., tuple[Any, Any, Any, Any]]
"""Takes what deepspeed.initialize takes, and returns the same four."""


_installed: Initialize | None = None


def install() -> None:
    """From now on ``deepspeed.initialize`` goes through ``mocte_ds.initialize`` if its config has a "mocte" block.

    Without one (or with null) it is DeepSpeed's own. The attribute of the module ``deepspeed`` is replaced, which
    transformers' Trainer and accelerate look up at every call; a name that was bound before, by ``from deepspeed import
    initialize``, stays DeepSpeed's: call this before such an import. A second call changes nothing.

    Raises:
        MocteError: somebody else has replaced it since the first call.
    """
    global _installed
    import deepspeed

    if _installed is not None:
        _require_in_place()
        return
    _installed = deepspeed.initialize = _choosing(deepspeed.initialize)
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("mocte_ds").warning(
            'mocte_ds is installed: deepspeed.initialize makes blocks if its config has a "mocte" block; '
            "mocte_ds.uninstall() undoes it."
        )


def uninstall() -> None:
    """Give ``deepspeed.initialize`` back; engines that exist stay as they are. Without :func:`install` nothing happens.

    What keeps accelerate from saving a part of an engine's model stays; other models are saved as accelerate does it.

    Raises:
        MocteError: somebody else has replaced it since.
    """
    global _installed
    import deepspeed

    if _installed is not None:
        _require_in_place()
        deepspeed.initialize, _installed = _installed.__wrapped__, None  # type: ignore[attr-defined]


def _require_in_place() -> None:
    import deepspeed

    if deepspeed.initialize is not _installed:
        where = getattr(deepspeed.initialize, "__module__", "somebody")
        raise MocteError(f"deepspeed.initialize was replaced by {where} after mocte_ds.install(); undo that first.")


@contextlib.contextmanager
def replaced_by(make: Initialize) -> Iterator[None]:
    """Context manager: ``deepspeed.initialize`` calls ``make`` with its arguments by name."""
    import deepspeed

    before = deepspeed.initialize
    deepspeed.initialize = lambda *args, **given: make(**inspect.signature(before).bind(*args, **given).arguments)
    try:
        yield
    finally:
        deepspeed.initialize = before


def config_of(given: Mapping[str, Any]) -> Any:
    """The config in the arguments of deepspeed.initialize, as DeepSpeed looks for it.

    Base64 is read here, a path stays one; DeepSpeed reads both as Hjson. accelerate's infinite `steps_per_print`
    becomes a number.
    """
    config = given.get("config")
    config = given.get("config_params") if config is None else config
    config = getattr(given.get("args"), "deepspeed_config", None) if config is None else config
    if isinstance(config, str) and not os.path.exists(config):
        with contextlib.suppress(ValueError):
            config = hjson.loads(base64.urlsafe_b64decode(config).decode())
    if isinstance(config, Mapping) and config.get("steps_per_print") == float("inf"):
        config = {**config, "steps_per_print": sys.maxsize}
    return config


def has_block(config: Any) -> bool:
    """Whether a config, a dict or the path of a JSON file, has a "mocte" block; what cannot be read has none."""
    if isinstance(config, str | os.PathLike):
        try:
            config = hjson.loads(Path(config).read_bytes().decode())
        except (OSError, ValueError):
            return False  # DeepSpeed says what is wrong with it
    return isinstance(config, Mapping) and config.get("mocte") is not None


def with_blocks(given: Mapping[str, Any], config: Any) -> tuple[Any, Any, Any, Any]:
    """mocte_ds.initialize for the arguments of deepspeed.initialize, with a config in place of theirs."""
    from mocte_ds.engine import initialize
    from mocte_ds.integrations.accelerate import refuse_partial_state_dicts

    refuse_partial_state_dicts()
    rest = {name: value for name, value in given.items() if name not in ("config", "config_params")}
    return initialize(**rest, config=config)


def _choosing(stock: Initialize) -> Initialize:
    @functools.wraps(stock)
    def initialize(*args: Any, **given: Any) -> tuple[Any, Any, Any, Any]:
        named = inspect.signature(stock).bind(*args, **given).arguments
        config = config_of(named)
        return with_blocks(named, config) if has_block(config) else stock(*args, **given)

    return initialize
