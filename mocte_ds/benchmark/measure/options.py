"""Sizes on a benchmark's command line, whose usual values depend on the device."""

import argparse
from collections.abc import Mapping

from mocte_ds.errors import MocteError


def add_sizes(
    parser: argparse.ArgumentParser, what: Mapping[str, str], usual: Mapping[str, Mapping[str, int | str]]
) -> None:
    """Add an option for each size; it is None until :func:`take_usual`.

    Args:
        parser: of the benchmark.
        what: what each size counts, by its name.
        usual: values by device, then by name; without one the device itself decides.
    """
    for name, words in what.items():
        by_device = "; ".join(f"{device} {sizes.get(name, 'all')}" for device, sizes in usual.items())
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=None, help=f"{words} (default: {by_device})")


def take_usual(args: argparse.Namespace, usual: Mapping[str, int | str]) -> None:
    """Give the options that were left out their usual values."""
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def require_at_least(args: argparse.Namespace, name: str, least: int) -> None:
    """Refuse an option that is too small."""
    value = getattr(args, name)
    if value < least:
        raise MocteError(f"--{name.replace('_', '-')} {value} must be at least {least}.")
