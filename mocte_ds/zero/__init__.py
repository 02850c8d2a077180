"""Freezing inside ZeRO's optimizer partitioning; the only place that touches DeepSpeed's private parts."""

from mocte_ds.zero.conformance import require_conformance, with_unit_optimizer
from mocte_ds.zero.front import Front, find_front
from mocte_ds.zero.optimizer import UnitState, UnitZeroOptimizer
from mocte_ds.zero.schedulers import follow_groups
from mocte_ds.zero.units import TRUNK, UnitRegistry, dense_unit, expert_unit, router_unit

__all__ = [
    "TRUNK",
    "Front",
    "UnitRegistry",
    "UnitState",
    "UnitZeroOptimizer",
    "dense_unit",
    "expert_unit",
    "find_front",
    "follow_groups",
    "require_conformance",
    "router_unit",
    "with_unit_optimizer",
]
