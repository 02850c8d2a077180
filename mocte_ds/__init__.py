"""mocte_ds: pre-training with mixtures of cluster-oriented, trainability-aware experts, as a DeepSpeed plugin."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["MocteEngine", "clusters", "initialize", "install", "spectrum", "trainability", "uninstall"]


def __getattr__(name: str) -> Any:
    # DeepSpeed takes seconds to import; tools that only read files do not need it.
    if name in ("initialize", "MocteEngine"):
        return getattr(importlib.import_module("mocte_ds.engine"), name)
    if name in ("install", "uninstall"):
        return getattr(importlib.import_module("mocte_ds.integrations"), name)
    if name in __all__:
        return importlib.import_module(f"mocte_ds.{name}")
    raise AttributeError(f"module 'mocte_ds' has no attribute '{name}'")
