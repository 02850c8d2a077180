"""Freezing inside ZeRO's optimizer partitioning; the only place that touches DeepSpeed's private parts."""

from mocte_ds.zero.conformance import require_conformance, with_unit_optimizer
from mocte_ds.zero.front import Front, find_front
from mocte_ds.zero.gather import exchanged, forward_pass, held, let_go, on_its_own, whole
from mocte_ds.zero.optimizer import UnitZeroOptimizer
from mocte_ds.zero.schedulers import follow_groups
from mocte_ds.zero.stage3 import UnitZero3Optimizer, prepare_model
from mocte_ds.zero.stage3_settings import require_stage3_settings
from mocte_ds.zero.storage import allocate_experts, follow_mode
from mocte_ds.zero.unit_optimizer import UnitOptimizer, UnitState
from mocte_ds.zero.units import TRUNK, UnitRegistry, dense_unit, expert_unit, router_unit

__all__ = [
    "TRUNK",
    "Front",
    "UnitOptimizer",
    "UnitRegistry",
    "UnitState",
    "UnitZero3Optimizer",
    "UnitZeroOptimizer",
    "allocate_experts",
    "dense_unit",
    "exchanged",
    "expert_unit",
    "find_front",
    "forward_pass",
    "follow_groups",
    "follow_mode",
    "held",
    "let_go",
    "on_its_own",
    "prepare_model",
    "require_conformance",
    "require_stage3_settings",
    "router_unit",
    "whole",
    "with_unit_optimizer",
]
