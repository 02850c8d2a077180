"""Read a run folder, also of a run that is still going or was cut off: what is there, and what could not be read."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from mocte_ds.errors import MocteError
from mocte_ds.report.run import Row, Run
from mocte_ds.secret_keys import command_shown, without_secrets
from mocte_ds.value_bounds import require_plain


def read_run(folder: Path | str) -> Run:
    """Read the logs of a run.

    A cut or damaged line is left out and noted; steps that a resume took back are left out and noted.

    Args:
        folder: the run folder, with at least one readable line in metrics.jsonl.

    Raises:
        MocteError: ``folder`` is not a run folder, or has no step in its log yet.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MocteError(f"{folder} is not a folder; give the folder that a run wrote, e.g. runs/quickstart.")
    log = folder / "metrics.jsonl"
    if not log.is_file():
        raise MocteError(
            f"{folder} is not a run folder: it has no metrics.jsonl. Give the folder that launch/pretrain.py wrote "
            "(--out), or that a script has named in engine.mocte.log_to."
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
    _place_events(events, metrics, notes)
    _place_validations(events, metrics)
    return Run(
        folder=folder,
        metrics=metrics,
        events=events,
        ledger={k: v for k, v in _json_file(folder / "ledger.json", notes).items() if _is_number(v)},
        facts=_facts(folder / "run.json", notes),
        evaluation=_json_file(folder / "evaluation" / "results.json", notes),
        notes=notes,
    )


def _facts(path: Path, notes: list[str]) -> dict[str, Any]:
    """run.json; what an earlier version has kept there of keys and passwords is left out."""
    facts = _json_file(path, notes)
    if isinstance(command := facts.get("command"), str):
        facts["command"] = command_shown(command.split(" "))
    if isinstance(settings := facts.get("deepspeed"), dict):
        block = {"mocte": settings["mocte"]} if "mocte" in settings else {}
        facts["deepspeed"] = {**without_secrets({k: v for k, v in settings.items() if k != "mocte"}), **block}
    return facts


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parse(text: str) -> Any:
    """JSON in which numbers that are NaN, infinite or beyond 64 bits become None; nothing else than a ValueError."""
    try:
        value = json.loads(text, parse_constant=lambda _: None, parse_float=_finite, parse_int=_counted)
        require_plain(value, "it")
    except (RecursionError, MemoryError) as error:
        raise ValueError("too deep or too large") from error
    return value


def _counted(text: str) -> int | None:
    return int(text) if len(text) < 19 else None


def _finite(text: str) -> float | None:
    return float(text) if math.isfinite(float(text)) else None


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


def _place_validations(events: list[Row], metrics: list[Row]) -> None:
    """Give a step the losses that a script has told of it, by events of their own: they come after the step's line."""
    rows = {row["step"]: row for row in metrics}
    for event in events:
        told, row = event.get("validation"), rows.get(event["step"])
        if event["event"] != "validation" or row is None or not isinstance(told, dict):
            continue
        losses = {**(row.get("validation") or {}), **{str(name): loss for name, loss in told.items()}}
        known = [loss for name, loss in losses.items() if name != "mean" and _is_number(loss)]
        row["validation"] = {**losses, "mean": sum(known) / len(known) if known else None}


def _place_events(events: list[Row], metrics: list[Row], notes: list[str]) -> None:
    """Give every event the tokens that the log of steps has at its step, so that all figures share one axis.

    An event of a step that is not in the log stands between its neighbours, one after the last step at the end.
    """
    steps, tokens = [row["step"] for row in metrics], [row["tokens"] for row in metrics]
    known, moved = set(steps), 0
    for event in events:
        own = event.get("tokens")
        event["tokens"] = round(float(np.interp(event["step"], steps, tokens)))
        moved += event["step"] in known and _is_number(own) and own != event["tokens"]
    if moved:
        notes.append(
            f"events.jsonl: {moved} event(s) count other tokens than metrics.jsonl does at the same step; they are "
            "shown where metrics.jsonl puts their step."
        )
