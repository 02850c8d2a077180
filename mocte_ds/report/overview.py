"""Facts about a run for the report: model, machine, data, method, versions, command."""

import json
import statistics
from typing import Any

from mocte_ds.report.facts import MOCTE, fact
from mocte_ds.report.run import Run
from mocte_ds.report.wording import integer, percent

SHOWN = (
    ("parameters of the dense model", ("parameters",)),
    ("style", ("model", "style")),
    ("class of the model", ("model", "class")),
    ("class of transformers", ("model", "hf.model_type")),
    ("layers", ("model", "num_layers")),
    ("layers", ("model", "hf.num_hidden_layers")),
    ("layers", ("model", "hf.n_layer")),
    ("hidden size", ("model", "hidden_size")),
    ("hidden size", ("model", "hf.hidden_size")),
    ("hidden size", ("model", "hf.n_embd")),
    ("FFN width", ("model", "intermediate_size")),
    ("FFN width", ("model", "hf.intermediate_size")),
    ("FFN width", ("model", "hf.n_inner")),
    ("vocabulary", ("model", "vocab_size")),
    ("vocabulary", ("model", "hf.vocab_size")),
    ("context (tokens)", ("training", "context")),
    ("ranks (processes)", ("world_size",)),
    ("device", ("device",)),
    ("ZeRO stage", ("deepspeed", "zero_optimization", "stage")),
    ("bf16", ("deepspeed", "bf16", "enabled")),
    ("experts in a block", (*MOCTE, "num_experts")),
    ("expert-parallel size", (*MOCTE, "ep_size")),
    ("kind of expert", (*MOCTE, "expert", "kind")),
    ("router", (*MOCTE, "router", "kind")),
    ("share of the budget between checks", (*MOCTE, "check_every")),
    ("deadline of emergence (share of the budget)", (*MOCTE, "clusters", "deadline")),
    ("freeze policy", (*MOCTE, "freeze", "policy")),
    ("seed", ("training", "seed")),
    ("sequences of a micro-batch", ("training", "micro_batch")),
    ("data manifest (SHA-256)", ("data", "manifest_sha256")),
    ("command", ("command",)),
)


def fact_rows(run: Run) -> list[tuple[str, str]]:
    """(name, value) of the settings in run.json that a reader asks for first, and of what the log itself shows."""
    rows = []
    if run.tokens_per_step:
        rows.append(("tokens of an optimizer step, all ranks", integer(run.tokens_per_step)))
    rows += [(name, _text(fact(run, *path))) for name, path in SHOWN if fact(run, *path) is not None]
    rates = [row["lr"] for row in run.metrics if row.get("lr") is not None]
    if rates:
        rows.append(("learning rate, largest and last", f"{max(rates):.3g}, {rates[-1]:.3g}"))
    if known := [row["mfu"] for row in run.metrics if row.get("mfu") is not None]:
        rows.append(("model FLOPs utilisation (MFU), median of the steps", percent(statistics.median(known), 1)))
    versions = fact(run, "versions")
    if isinstance(versions, dict):
        rows.append(("versions", ", ".join(f"{name} {value}" for name, value in versions.items())))
    return rows


def everything(run: Run) -> str:
    """run.json as text; empty without one."""
    return json.dumps(run.facts, indent=2, ensure_ascii=False, sort_keys=True) if run.facts else ""


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return integer(value) if abs(value) >= 10_000 else str(value)
    return str(value)
