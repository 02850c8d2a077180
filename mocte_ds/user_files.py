"""Files of the user's own that tools import: they register routing keys and freeze policies that a config names."""

import argparse
import importlib.util
import sys
from pathlib import Path

from mocte_ds.errors import ConfigError
from mocte_ds.paths import is_file
from mocte_ds.shown import one_line, path_shown

_OPTION = "--import"


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """Add `--import FILE`; ``imports`` of the arguments goes to :func:`import_files`."""
    parser.add_argument(
        _OPTION,
        dest="imports",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="Python file that registers a routing key or freeze policy of your own; may be given several times",
    )


def import_files(paths: list[Path]) -> None:
    """Run files as modules of their names, with their folders on the path of imports as `python FILE` has it.

    Raises:
        ConfigError: no such file, a module of that name is there already, or the file does not run.
    """
    for path in paths:
        shown = f"{_OPTION} {path_shown(path)}"
        if path.suffix != ".py" or not is_file(path):
            raise ConfigError(f"{shown}: there is no such file of Python.")
        path = path.resolve()
        there = sys.modules.get(path.stem)
        if there is not None:
            if Path(getattr(there, "__file__", None) or "").resolve() == path:
                continue
            raise ConfigError(f"{shown}: there is a module {path.stem!r} already; give the file another name.")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None  # the name ends with .py
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever the user's code raises
            del sys.modules[path.stem]
            raise ConfigError(f"{shown}: {type(error).__name__}: {one_line(error)}") from error
        finally:
            sys.path.remove(str(path.parent))
