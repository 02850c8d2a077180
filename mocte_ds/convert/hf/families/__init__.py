"""Mixture classes of transformers, one file each: which runs become one, and which folders runs start from."""

import importlib
import pkgutil

from mocte_ds.convert.hf.families.family import FAMILIES, Family, Start, register
from mocte_ds.convert.hf.families.run import Mixture
from mocte_ds.convert.hf.families.tensors import Pair

# Each file of this folder registers its own class.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["FAMILIES", "Family", "Mixture", "Pair", "Start", "register"]
