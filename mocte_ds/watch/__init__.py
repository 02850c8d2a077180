"""Where every rank stands, and what is said and done when one stands still."""

from mocte_ds.watch.heartbeat import HEART, part, phase

__all__ = ["HEART", "part", "phase"]
