"""Facts about a run for the report: model, machine, data, method, versions, command."""

import json
from typing import Any

from mocte_ds.report.facts import first_setting, section, setting
from mocte_ds.report.reader import Run
from mocte_ds.report.wording import MISSING, integer

LOOKED_FOR: tuple[tuple[str, tuple[str | tuple[str, ...], ...]], ...] = (
    ("parameters of the model", ("parameters", "num_params", "model_parameters", "params")),
    ("style", (("model", "style"), "style")),
    ("layers", ("num_layers", "num_hidden_layers")),
    ("hidden size", ("hidden_size",)),
    ("FFN width", ("intermediate_size",)),
    ("vocabulary", ("vocab_size",)),
    ("context (tokens)", (("training", "context"), "context", "max_positions", "seq_length")),
    ("ranks (world size)", ("world_size",)),
    ("device", ("device", "accelerator", "hardware")),
    ("ZeRO stage", (("zero_optimization", "stage"), "zero_stage")),
    ("bf16", (("bf16", "enabled"),)),
    ("experts in a block", ("num_experts",)),
    ("expert-parallel size", ("ep_size",)),
    ("kind of expert", (("expert", "kind"),)),
    ("router", (("router", "kind"),)),
    ("share of the budget between checks", ("check_every",)),
    ("deadline of emergence (share)", (("clusters", "deadline"),)),
    ("freeze policy", (("freeze", "policy"),)),
    ("seed", (("training", "seed"), "seed")),
    ("sequences of a micro-batch", (("training", "micro_batch"), "train_micro_batch_size_per_gpu")),
    ("data manifest (hash)", ("manifest_sha256", "manifest_hash", "data_manifest", ("manifest", "sha256"), "manifest")),
    ("tokenizer (hash)", ("tokenizer_sha256", ("tokenizer", "sha256"), "tokenizer")),
    ("command", ("command", "argv", "command_line")),
    ("started", ("started", "start_time", "time", "date")),
)


def fact_rows(run: Run) -> list[tuple[str, str]]:
    """(name, value) of what run.json says under any of the usual names, and what the log itself shows."""
    rows = []
    for label, names in LOOKED_FOR:
        value = first_setting(run, *names)
        if value is not None:
            rows.append((label, _text(value)))
    if run.tokens_per_step:
        rows.insert(0, ("global tokens per optimizer step", integer(run.tokens_per_step)))
    rates = [row["lr"] for row in run.metrics if row.get("lr") is not None]
    if rates:
        rows.append(("learning rate, largest and last", f"{max(rates):.3g}, {rates[-1]:.3g}"))
    versions = section(run, "versions")
    if versions:
        rows.append(("versions", ", ".join(f"{name} {_text(value)}" for name, value in versions.items())))
    return rows


def everything(run: Run) -> str:
    """run.json as text; empty without one."""
    return json.dumps(run.facts, indent=2, ensure_ascii=False, sort_keys=True) if run.facts else ""


def fact(run: Run, *keys: str) -> str:
    """One setting as text."""
    value = setting(run, *keys)
    return MISSING if value is None else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return integer(value) if abs(value) >= 10_000 else str(value)
    if isinstance(value, list):
        return " ".join(str(part) for part in value)
    return str(value)
