"""Read a run folder, also of a run that is still going or was cut off: what is there, and what could not be read."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mocte_ds.errors import MocteError

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
    return [entry for entry in event.get("blocks") or [] if isinstance(entry, dict) and "block" in entry]


def read_run(folder: Path | str) -> Run:
    """Read the logs of a run.

    A cut or damaged line is left out and noted; steps that a resume took back are left out and noted.

    Args:
        folder: the run folder, with at least one readable line in metrics.jsonl.

    Raises:
        MocteError: ``folder`` is no run folder, or has no step in its log yet.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MocteError(f"{folder} is no folder; give the folder that a run wrote, e.g. runs/quickstart.")
    log = folder / "metrics.jsonl"
    if not log.is_file():
        raise MocteError(
            f"{folder} is no run folder: it has no metrics.jsonl. Give the folder that launch/pretrain.py wrote "
            f"(--out)."
        )
    notes: list[str] = []
    rows = [row for row in _json_lines(log, notes) if _is_number(row.get("step")) and _is_number(row.get("tokens"))]
    if not rows:
        raise MocteError(
            f"{log} has no readable step: the run has not finished its first step, or the log was damaged. Wait for a "
            "step, or start the run again."
        )
    metrics = _last_of_each_step(rows, notes)
    events = _without_undone(_json_lines(folder / "events.jsonl", notes), notes)
    _fill_tokens(events, metrics)
    return Run(
        folder=folder,
        metrics=metrics,
        events=events,
        ledger={k: v for k, v in _json_file(folder / "ledger.json", notes).items() if _is_number(v)},
        facts=_json_file(folder / "run.json", notes),
        evaluation=_json_file(folder / "evaluation" / "results.json", notes),
        notes=notes,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=lambda _: None)


def _json_lines(path: Path, notes: list[str]) -> list[Row]:
    if not path.is_file():
        notes.append(f"{path.name} is missing.")
        return []
    rows, bad = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad.append(number)
    if bad:
        lines = ", ".join(str(number) for number in bad[:5]) + (" and more" if len(bad) > 5 else "")
        notes.append(f"{path.name}: {len(bad)} line(s) could not be read and are left out (line {lines}).")
    return rows


def _json_file(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = _parse(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name} could not be read and is left out.")
        return {}
    return value


def _last_of_each_step(rows: list[Row], notes: list[str]) -> list[Row]:
    """A run that resumes from a checkpoint repeats steps: what was logged before for them was taken back."""
    kept: list[Row] = []
    undone = 0
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
            undone += 1
        kept.append(row)
    if undone:
        notes.append(f"metrics.jsonl: {undone} step(s) were repeated after a resume; only the last of each is shown.")
    return kept


def _without_undone(rows: list[Row], notes: list[str]) -> list[Row]:
    """Drop what happened after the checkpoint that a later resume went back to."""
    kept: list[Row] = []
    undone = 0
    for row in rows:
        if not (isinstance(row.get("event"), str) and isinstance(row.get("step"), int)):
            continue
        if row["event"] == "resume":
            before = len(kept)
            kept = [event for event in kept if event["step"] <= row["step"]]
            undone += before - len(kept)
        kept.append(row)
    if undone:
        notes.append(
            f"events.jsonl: {undone} event(s) after the checkpoint of a resume were taken back and are left out."
        )
    return kept


def _fill_tokens(events: list[Row], metrics: list[Row]) -> None:
    """Events without a number of tokens stand where the log of steps says that their step stands."""
    tokens_at = {row["step"]: row["tokens"] for row in metrics}
    for event in events:
        if not _is_number(event.get("tokens")):
            event["tokens"] = tokens_at.get(event["step"], 0)


def _block_label(index: int, name: str) -> str:
    numbers = [part for part in name.split(".") if part.isdigit()]
    return f"block {index} (layer {numbers[0]})" if numbers else f"block {index}"
