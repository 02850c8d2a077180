"""Checkpoints to Hugging Face format: stock classes only, exact, checked before an export counts as done."""

from mocte_ds.checkpoints.hf.export import export

__all__ = ["export"]
