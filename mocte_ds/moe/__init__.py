"""The expert layer: blocks, banks of experts, gates and dispatch."""

from mocte_ds.moe.attach import attach
from mocte_ds.moe.bank import Bank
from mocte_ds.moe.block import Block, BlockMode, ExpertMode

__all__ = ["Bank", "Block", "BlockMode", "ExpertMode", "attach"]
