"""Puts what the ranks measured at each share of frozen experts beside the formulas, and writes it as tables."""

import statistics
from collections.abc import Sequence
from typing import Any

from mocte_ds.benchmark.measure.freeze_plan import FreezeSizes, expected, expected_freed, step_flops
from mocte_ds.text_table import brief, percent, text_table

# Names in the formulas and, of the second line, kinds of the counter.
_BYTES = ("optimizer", "gradients", "gradients_held", "gradients_in_backward")
_WIRE = ("expert gradients", "all gradients", "expert weights", "all weights", "token rows")
_PHASES = ("forward", "backward", "step")
# The shortest time counts, as longer ones show what else the machine does; processor time leaves out all waiting.
_TIMES = {"measured": "shortest", "median": "median", "processor": "processor"}


def stops(sizes: FreezeSizes, by_rank: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a share of frozen experts.

    Args:
        sizes: of the run.
        by_rank: what :func:`mocte_ds.benchmark.measure.freeze_run.run_rank` returned on every rank.

    Returns:
        For each share "bytes" and "wire" (measured and by formula, means over the ranks, and the largest difference on
        any rank), "freed", "step" (seconds of each phase) with the "flops" of the expectation, and "freezing".
    """
    found: list[dict[str, Any]] = []
    for number, share in enumerate(sizes.frozen):
        ranks = [result["stops"][number] for result in by_rank]
        should = [expected(sizes, share, place, rank["leaving"]) for place, rank in enumerate(ranks)]
        stop: dict[str, Any] = {"frozen_percent": share, "frozen_experts": sizes.frozen_experts(share)}
        stop["bytes"] = {
            name: _beside([rank["bytes"][name] for rank in ranks], [e[name] for e in should]) for name in _BYTES
        }
        stop["wire"] = {name: _wire(name, ranks, [e[name] for e in should]) for name in _WIRE}
        stop["control"] = _traffic("control", ranks)
        flops = step_flops(sizes, share, ranks[0]["load"])
        stop["flops"] = {name: getattr(flops, name) for name in ("forward", "dgrad", "wgrad", "wgrad_saved", "routing")}
        stop["step"] = {
            phase: {name: _mean(rank["seconds"][phase][key] for rank in ranks) for name, key in _TIMES.items()}
            for phase in _PHASES
        }
        first = found[0] if found else stop
        _compare(sizes, stop, first, ranks, [result["stops"][0] for result in by_rank])
        stop["freezing"] = _freezing(ranks, stop["step"]["total"]["measured"])
        found.append(stop)
    return found


def stops_text(found: Sequence[dict[str, Any]]) -> str:
    """Tables of bytes, of seconds and of the freezing."""
    head = [
        "frozen",
        "optimizer",
        "gradients",
        "as held",
        "in backward",
        "reduced: experts",
        "others",
        "gathered: experts",
    ]
    head += ["others", "token rows", "experts' wire", "off by"]
    rows, times, calls = [], [], []
    for stop in found:
        share, size, wire = f"{stop['frozen_percent']} %", stop["bytes"], stop["wire"]
        columns = [*size.values(), *wire.values()]
        off = max(abs(column["difference"]) for column in columns)
        rows.append([share, *(_pair(c, 1e-6) for c in columns), percent(stop["experts_wire"]["measured"]), brief(off)])
        phases, saved = stop["step"], stop["flops"]["wgrad_saved"]
        spent = sum(stop["flops"][name] for name in ("forward", "dgrad", "wgrad", "routing"))
        wall = [_pair(phases[name], 1e3) for name in phases]
        times.append(
            [
                share,
                *wall,
                _pair(phases["total"], 1e3, "processor", "processor_by_formula"),
                percent(saved / (spent + saved)),
            ]
        )
        freezing = stop["freezing"]
        if freezing["calls"]:
            moved, agreed = freezing["tensor_bytes"], freezing["control_bytes"]
            extra = None if freezing["extra_bytes"] is None else freezing["extra_bytes"] / 1e6
            seconds = 1e3 * freezing["seconds"]
            calls.append([share, brief(freezing["calls"]), brief(seconds), brief(freezing["steps"])])
            calls[-1] += [brief(moved), brief(agreed), brief(extra)]
    last = found[-1]["freed"]
    parts = " + ".join(f"{last[name]:,.0f}" for name in ("weights_and_moments", "step_counters", "padding"))
    return "\n\n".join(
        [
            "MB per rank and step, measured (by formula); the last column: largest difference on any rank, bytes\n"
            + text_table(head, rows),
            f"optimizer bytes of a rank that freezing {found[-1]['frozen_percent']} % gives back: "
            f"{last['measured']:,.0f}; by formula {parts} (12 bytes per parameter over its ranks, counters, padding), "
            f"off by {brief(last['difference'])}",
            "ms, shortest (by formula)\n"
            + text_table(["frozen", "forward", "backward", "optimizer", "step", "processor", "FLOPs not spent"], times),
            "freezing one expert\n"
            + text_table(
                ["up to", "calls", "ms each", "in steps", "bytes of tensors", "bytes of messages", "MB extra"], calls
            ),
        ]
    )


def _compare(
    sizes: FreezeSizes,
    stop: dict[str, Any],
    first: dict[str, Any],
    ranks: list[dict[str, Any]],
    first_ranks: list[dict[str, Any]],
) -> None:
    """Add what is known only beside the run without frozen experts."""
    share = stop["frozen_percent"]
    parts = [expected_freed(sizes, share, rank) for rank in range(sizes.ranks)]
    freed = [a["bytes"]["optimizer"] - b["bytes"]["optimizer"] for a, b in zip(first_ranks, ranks, strict=True)]
    means = {name: _mean(part[name] for part in parts) for name in parts[0]}
    stop["freed"] = {**_beside(freed, [sum(part.values()) for part in parts]), **means}
    experts = [sum(s["wire"][f"expert {what}"]["measured"] for what in ("gradients", "weights")) for s in (stop, first)]
    stop["experts_wire"] = {"measured": experts[0] / experts[1], "by_formula": 1 - share / 100}
    flops, all_flops = stop["flops"], first["flops"]
    backward = (flops["dgrad"] + flops["wgrad"]) / (all_flops["dgrad"] + all_flops["wgrad"])
    optimizer = stop["bytes"]["optimizer"]["by_formula"] / first["bytes"]["optimizer"]["by_formula"]
    steps = stop["step"]
    for phase, factor in zip(_PHASES, (1.0, backward, optimizer), strict=True):
        steps[phase]["by_formula"] = first["step"][phase]["measured"] * factor
        steps[phase]["processor_by_formula"] = first["step"][phase]["processor"] * factor
    steps["total"] = {name: sum(steps[phase][name] for phase in _PHASES) for name in steps["forward"]}


def _freezing(ranks: list[dict[str, Any]], step_seconds: float) -> dict[str, Any]:
    """The calls of a stop, all ranks together; seconds and memory of the slowest and largest."""
    calls = [call for rank in ranks for call in rank["freezing"]]
    if not calls:
        return {"calls": 0}
    seconds = statistics.median(call["seconds"] for call in calls)
    moved = [sum(t["payload_bytes"] for kind, t in c["traffic"].items() if kind != "control") for c in calls]
    agreed = [c["traffic"]["control"]["payload_bytes"] for c in calls if "control" in c["traffic"]]
    extra = [call["extra_bytes"] for call in calls if call["extra_bytes"] is not None]
    return {
        "calls": len(ranks[0]["freezing"]),
        "seconds": seconds,
        "steps": seconds / step_seconds,
        "tensor_bytes": max(moved),
        "control_bytes": max(agreed, default=0),
        "extra_bytes": max(extra, default=None),
    }


def _wire(kind: str, ranks: list[dict[str, Any]], should: Sequence[float]) -> dict[str, float]:
    payload = [_of(rank, kind, "payload_bytes") for rank in ranks]
    beside = _beside(payload, should)
    if kind == "token rows":  # what comes back depends on the routing, the sum over the ranks does not
        beside["difference"] = beside["measured"] - beside["by_formula"]
    return {**beside, "ring": _mean(_of(rank, kind, "ring_bytes") for rank in ranks)}


def _traffic(kind: str, ranks: list[dict[str, Any]]) -> dict[str, float]:
    return {name: _mean(_of(rank, kind, name) for rank in ranks) for name in ("calls", "payload_bytes", "ring_bytes")}


def _of(rank: dict[str, Any], kind: str, name: str) -> float:
    return rank["traffic"].get(kind, {}).get(name, 0)


def _beside(measured: Sequence[float], should: Sequence[float]) -> dict[str, float]:
    """Means over the ranks, and the difference on the rank where it is largest."""
    difference = max((m - s for m, s in zip(measured, should, strict=True)), key=abs)
    return {"measured": _mean(measured), "by_formula": _mean(should), "difference": difference}


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def _pair(beside: dict[str, float], factor: float, name: str = "measured", formula: str = "by_formula") -> str:
    return f"{brief(factor * beside[name])} ({brief(factor * beside[formula])})"
