"""A plan as text for a terminal."""

from typing import Any

from mocte_ds.plan.memory import PHASES
from mocte_ds.text_table import text_table


def plan_text(found: dict[str, Any]) -> str:
    """What :func:`mocte_ds.plan.layouts.plan` has found, as paragraphs and tables."""
    p, layout, saved = found["parameters"], found["layout"], found["checkpoint"]
    parts = [
        f"parameters after emergence: {p['total'] / 1e9:.3f} B, {p['active'] / 1e9:.3f} B of them active per token; "
        f"{found['flops_per_token']['after'] / 1e9:.1f} GFLOPs per token (warm-up "
        f"{found['flops_per_token']['warm-up'] / 1e9:.1f})",
        f"the run file's layout: {_layout(layout)} on {layout['ranks']} GPUs; GB of one GPU by phase:",
        _phases(found["phases"]),
        f"{'fits' if found['fits'] else 'DOES NOT FIT'} {found['gpu_memory'] / 1e9:.0f} GB. Host memory at the start "
        f"{found['host_memory_at_start'] / 1e9:.0f} GB per host. A checkpoint has {saved['warm-up'] / 1e9:.0f} GB in "
        f"warm-up, {saved['after'] / 1e9:.0f} GB after it, and takes {found['save_seconds']:.0f} s.",
        _seconds(found),
        f"layouts that fit: {found['layouts_that_fit']}" + (", the fastest:" if found["layouts"] else "."),
    ]
    if found["layouts"]:
        head = ["EP", "ZeRO", "micro-batch", "recompute", "largest phase", "GB", "s per step"]
        parts.append(text_table(head, [_row(one) for one in found["layouts"]], left=("largest phase",)))
    parts += ["the same run on more GPUs, each with its fastest layout that fits:", _growth(found["growth"])]
    return "\n\n".join(parts)


def _layout(layout: dict[str, Any]) -> str:
    recompute = "with" if layout["recompute"] else "without"
    return (
        f"EP {layout['ep_size']}, ZeRO-{layout['stage']}, micro-batch {layout['micro_batch']}, {recompute} activation "
        "checkpointing"
    )


def _phases(phases: dict[str, dict[str, float]]) -> str:
    rows = [[cause, *(f"{phases[phase][cause] / 1e9:.2f}" for phase in PHASES)] for cause in phases["warm-up"]]
    return text_table(["", *PHASES], rows, left=("",))


def _seconds(found: dict[str, Any]) -> str:
    lines = []
    for name, step in found["seconds_per_step"].items():
        wire = ", ".join(f"{cause} {size / 1e9:.2f}" for cause, size in step["wire"].items())
        lines.append(
            f"{name}: {step['step']:.2f} s per step ({step['compute']:.2f} computing, {step['communication']:.2f} on "
            f"the wire if none of it is hidden); GB that leave a GPU in a step: {wire}"
        )
    return "\n".join([*lines, f"{found['tokens'] / 1e9:.1f} B tokens take {found['days']:.1f} days"])


def _row(one: dict[str, Any]) -> list[str]:
    recompute = "yes" if one["recompute"] else "no"
    sizes = [f"{one['bytes'] / 1e9:.1f}", f"{one['seconds']:.2f}"]
    return [str(one["ep_size"]), str(one["stage"]), str(one["micro_batch"]), recompute, one["phase"], *sizes]


def _growth(growth: list[dict[str, Any]]) -> str:
    sizes = sorted({ep for one in growth for ep in one["seconds_by_ep_size"]})
    head = ["GPUs", "M tokens", "layout", "s per step", "days", *(f"EP {ep}" for ep in sizes)]
    rows = []
    for one in growth:
        by_ep = [f"{s:.2f}" if (s := one["seconds_by_ep_size"].get(ep)) is not None else "-" for ep in sizes]
        best, first = one["best"], [str(one["gpus"]), f"{one['batch_tokens'] / 1e6:.2f}"]
        if best is None:
            rows.append([*first, "none fits, or the batch cannot be split", "-", "-", *by_ep])
        else:
            rows.append([*first, _layout(best), f"{best['seconds']:.2f}", f"{one['days']:.1f}", *by_ep])
    return text_table(head, rows, left=("layout",))
