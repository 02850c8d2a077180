"""The numbers of a run in DeepSpeed's monitors (TensorBoard, W&B, CSV, Comet), wherever its config turns one on.

Every series begins with ``mocte/`` and lies over the tokens that the run has seen.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mocte_ds.logs.files import cannot_write
from mocte_ds.moe.block import BlockMode, ExpertMode

OF_STEPS = (
    *("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "optimizer_bytes"),
    *("blocks_with_experts", "training_experts", "frozen_experts", "skipped_steps"),
)
"""Numbers of a line of metrics.jsonl."""
OF_BLOCKS = ("silhouette", "stability", "clusters", "nmi", "purity")
"""Numbers that a check has for each block."""


class Monitors:
    """DeepSpeed's monitors of one engine; where none is turned on every call does nothing."""

    def __init__(self, monitor: Any) -> None:
        """Of `engine.monitor`, or None."""
        self._monitor = monitor
        self.enabled: bool = monitor is not None and monitor.enabled
        """The same on all ranks; rank 0 alone writes."""

    def step(self, metrics: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl, and how uneven the loads of each block are."""
        self._write(step_scalars(metrics), metrics["tokens"])

    def event(self, event: dict[str, Any]) -> None:
        """Show what a check has measured, or a validation; other events have no numbers of their own."""
        if event["event"] == "check":
            self._write(check_scalars(event), event["tokens"])
        if event["event"] == "validation":
            self._write({f"validation/{name}": loss for name, loss in event["validation"].items()}, event["tokens"])

    def _write(self, scalars: dict[str, float | None], tokens: int) -> None:
        if not self.enabled:
            return
        found = {name: value for name, value in scalars.items() if value is not None}
        try:
            self._monitor.write_events([(f"mocte/{name}", value, tokens) for name, value in found.items()])
        except OSError as error:
            raise cannot_write(Path("the files of DeepSpeed's monitors"), error) from error


def step_scalars(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Series of a line of metrics.jsonl."""
    scalars: dict[str, float | None] = {name: metrics.get(name) for name in OF_STEPS}
    for domain, loss in (metrics.get("validation") or {}).items():
        scalars[f"validation/{domain}"] = loss
    for block, load in enumerate(metrics.get("expert_load") or []):
        scalars[f"load_max_mean/block{block}"] = max(load) * len(load) / sum(load) if sum(load) else None
    return scalars


def check_scalars(event: dict[str, Any]) -> dict[str, float | None]:
    """Series of a check: what it found in each block, and the trainability and the tokens of each expert."""
    scalars: dict[str, float | None] = {}
    for entry in event["blocks"]:
        block = f"block{entry['block']}"
        scalars |= {f"{name}/{block}": entry.get(name) for name in OF_BLOCKS}
        for expert in entry["experts"]:
            scalars[f"lambda/{block}/expert{expert['expert']}"] = expert["lambda"]
        for number, load in enumerate(entry.get("load") or []):
            scalars[f"load/{block}/expert{number}"] = load
    return scalars


def block_modes(blocks: Sequence[Any]) -> list[dict[str, Any]]:
    """Layer and modes of every block, as the ledger of FLOPs reads them.

    Args:
        blocks: `engine.mocte.blocks`.
    """
    return [
        {"layer": b.block.layer, "mode": str(b.mode), "experts": [str(expert.mode) for expert in b.experts]}
        for b in blocks
    ]


def mode_counts(blocks: Sequence[Any]) -> dict[str, int]:
    """How many blocks have experts, and how many experts train and are frozen.

    Args:
        blocks: `engine.mocte.blocks`.
    """
    modes = [expert.mode for block in blocks for expert in block.experts]
    return {
        "blocks_with_experts": sum(block.mode is not BlockMode.WARMUP for block in blocks),
        "training_experts": modes.count(ExpertMode.TRAINING),
        "frozen_experts": modes.count(ExpertMode.FROZEN),
    }
