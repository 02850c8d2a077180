"""mocte_ds: pre-training with mixtures of cluster-oriented, trainability-aware experts, as a DeepSpeed plugin."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["initialize"]


def __getattr__(name: str) -> Any:
    # DeepSpeed takes seconds to import; tools that only read files do not need it.
    if name == "initialize":
        from mocte_ds.engine import initialize

        return initialize
    raise AttributeError(f"module 'mocte_ds' has no attribute '{name}'")
