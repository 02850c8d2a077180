"""Places where people already train: stock DeepSpeed scripts, transformers' Trainer, accelerate."""

from mocte_ds.integrations.stock_calls import install, uninstall

__all__ = ["install", "uninstall"]
