"""The logs of one run in memory, and what figures and tables ask them."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass
class Run:
    """The logs of one run; numbers that are NaN or infinite in a log are None here."""

    folder: Path
    metrics: list[Row]
    """One row an optimizer step, in the order of steps."""
    events: list[Row] = field(default_factory=list)
    """What happened, in the order of happening."""
    ledger: dict[str, float] = field(default_factory=dict)
    """FLOPs by component; empty if not written yet."""
    facts: dict[str, Any] = field(default_factory=dict)
    """run.json; empty if there is none."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """evaluation/results.json; empty if there is none."""
    notes: list[str] = field(default_factory=list)
    """What was left out of the logs and why, for the reader of the report."""

    def of_kind(self, *kinds: str) -> list[Row]:
        """Events of some kinds, in order."""
        return [event for event in self.events if event["event"] in kinds]

    @cached_property
    def checks(self) -> list[Row]:
        """Check events."""
        return self.of_kind("check")

    @cached_property
    def blocks(self) -> dict[int, str]:
        """Label of each block, e.g. ``block 0 (layer 2)``, by its index."""
        names: dict[int, str] = {}
        for event in self.events:
            for entry in block_entries(event) + [event]:
                if isinstance(entry.get("block"), int):
                    names[entry["block"]] = entry.get("name") or names.get(entry["block"], "")
        for row in self.metrics:
            for index in range(len(row.get("expert_load") or [])):
                names.setdefault(index, "")
        return {index: _block_label(index, names[index]) for index in sorted(names)}

    @cached_property
    def experts(self) -> dict[int, int]:
        """Number of expert slots of each block."""
        counts = dict.fromkeys(self.blocks, 0)
        for check in self.checks:
            for entry in block_entries(check):
                counts[entry["block"]] = max(counts[entry["block"]], len(entry.get("experts") or []))
        for row in self.metrics:
            for index, load in enumerate(row.get("expert_load") or []):
                counts[index] = max(counts.get(index, 0), len(load or []))
        return counts

    @cached_property
    def domains(self) -> list[str]:
        """Names of the data's domains, in the order in which the logs name them."""
        names: dict[str, None] = {}
        for row in self.metrics:
            names.update(dict.fromkeys(name for name in (row.get("validation") or {}) if name != "mean"))
        for event in self.events:
            if event["event"] == "projection":
                names.update(dict.fromkeys(event.get("domain") or []))
            for entry in block_entries(event):
                names.update(dict.fromkeys(entry.get("domain_load") or {}))
        return [str(name) for name in names]

    @cached_property
    def validations(self) -> list[Row]:
        """Rows of ``metrics`` that carry a validation."""
        return [row for row in self.metrics if row.get("validation")]

    @property
    def tokens(self) -> int:
        """Tokens that the run has trained on."""
        return int(self.metrics[-1]["tokens"])

    @property
    def tokens_per_step(self) -> int | None:
        """Global tokens of the last optimizer step, or None where the log cannot say."""
        *earlier, last = self.metrics
        if not earlier:
            return last["tokens"] // last["step"] if last["step"] else None
        return (last["tokens"] - earlier[-1]["tokens"]) // (last["step"] - earlier[-1]["step"])

    def block_history(self, block: int) -> list[tuple[int, Row]]:
        """What the checks say of one block: (tokens, entry of the check) in order of time."""
        return [
            (check["tokens"], entry)
            for check in self.checks
            for entry in block_entries(check)
            if entry["block"] == block
        ]


def block_entries(event: Row) -> list[Row]:
    """The entries by block of a check; empty for any other event."""
    entries = event.get("blocks") or []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("block"), int)]


def _block_label(index: int, name: str) -> str:
    numbers = [part for part in name.split(".") if part.isdigit()]
    return f"block {index} (layer {numbers[0]})" if numbers else f"block {index}"
