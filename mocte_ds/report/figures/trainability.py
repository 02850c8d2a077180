"""Figure: trainability of every expert over time, with freezes and thaws."""

import numpy as np
from matplotlib.figure import Figure

from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.layout import LINE_POINTS, label_ends, outer_labels, panels, token_axis
from mocte_ds.report.figures.palette import category_color, category_marker
from mocte_ds.report.reader import Run
from mocte_ds.report.wording import plural, significant


def missing(run: Run) -> str | None:
    if not measured_blocks(run):
        return "no expert has been measured: experts have not emerged yet, or the freeze policy is off."
    return None


def series(run: Run, block: int, expert: int) -> tuple[list[int], list[float]]:
    """(tokens, lambda) of an expert at the checks at which it trained."""
    tokens, values = [], []
    for at, entry in run.block_history(block):
        for row in entry.get("experts") or []:
            if row.get("expert") == expert and row.get("lambda") is not None and row.get("mode") != "frozen":
                tokens.append(at)
                values.append(row["lambda"])
    return tokens, values


def measured_blocks(run: Run) -> list[int]:
    """Blocks of which at least one expert has a measured trainability."""
    return [block for block in run.blocks if any(series(run, block, k)[0] for k in range(run.experts[block]))]


def draw(run: Run, narrow: bool) -> Figure:
    blocks = measured_blocks(run)
    most = max(run.experts[block] for block in blocks)
    figure, axes = panels(len(blocks), narrow, max(2.2, 0.7 + most * LINE_POINTS / 72))
    values = np.array([v for b in blocks for k in range(run.experts[b]) for v in series(run, b, k)[1]], dtype=float)
    logarithmic = bool((values > 0).all() and values.max() / values.min() > 8)
    first = min(series(run, b, k)[0][0] for b in blocks for k in range(run.experts[b]) if series(run, b, k)[0])
    pending = []
    for axis, block in zip(axes, blocks, strict=True):
        labels = []
        for expert in range(run.experts[block]):
            x, y = series(run, block, expert)
            if not x:
                continue
            color = category_color(expert)
            axis.plot(x, y, color=color, marker=category_marker(expert), ms=3, mec="white", mew=0.3, lw=1.1)
            labels.append((y[-1], f"e{expert}" + (" frozen" if _frozen(run, block, expert) else ""), color))
        for event in run.of_kind("freeze", "thaw"):
            at = _value_at(run, event) if event.get("block") == block else None
            if at is not None:
                marker = "X" if event["event"] == "freeze" else "^"
                color = category_color(event["expert"])
                axis.plot(event["tokens"], at, marker, color=color, ms=9, mec="black", mew=0.8, zorder=4)
        axis.set_title(run.blocks[block])
        name = token_axis(axis, run.tokens)
        axis.set_xlim(max(0, first - 0.03 * run.tokens), run.tokens * 1.01)
        pending.append((axis, labels))
    if logarithmic:
        axes[0].set_yscale("log")
    elif values.min() >= 0:
        axes[0].set_ylim(0, values.max() * 1.08)
    outer_labels(axes, name, "trainability λ\n(per token" + (", log)" if logarithmic else ")"))
    label_ends(pending)
    return figure


def _frozen(run: Run, block: int, expert: int) -> bool:
    mine = [e for e in run.of_kind("freeze", "thaw") if e.get("block") == block and e.get("expert") == expert]
    return bool(mine) and mine[-1]["event"] == "freeze"


def _value_at(run: Run, event: dict) -> float | None:
    """Lambda of an expert at an event: the event's own, or that of the last check before it."""
    if event.get("expert") is None:
        return None
    if event.get("lambda") is not None:
        return event["lambda"]
    x, y = series(run, event["block"], event["expert"])
    before = [value for tokens, value in zip(x, y, strict=True) if tokens <= event["tokens"]]
    return before[-1] if before else None


def caption(run: Run) -> str:
    parts = []
    for block in measured_blocks(run):
        probes = sum(len(series(run, block, k)[0]) for k in range(run.experts[block]))
        ends = [series(run, block, k)[1] for k in range(run.experts[block]) if series(run, block, k)[0]]
        last = [values[-1] for values in ends]
        ratio = [values[-1] / max(values) for values in ends if max(values) > 0]
        text = f"{run.blocks[block]} {plural(probes, 'value')} of {plural(len(ends), 'expert')}, last λ from "
        text += f"{significant(min(last))} to {significant(max(last))}"
        if ratio:
            text += f" ({significant(min(ratio), 2)} to {significant(max(ratio), 2)} of its own peak)"
        parts.append(text)
    marks = plural(len(run.of_kind("freeze")), "freeze"), plural(len(run.of_kind("thaw")), "thaw")
    return (
        "λ: largest eigenvalue of the expert's neural-tangent kernel on a sample of its own tokens, over the "
        "sample's size; "
        f"every check as logged, not smoothed. By block: {'; '.join(parts)}. Crosses and triangles: {marks[0]}, "
        f"{marks[1]}."
    )


FIGURE = FigureKind(
    name="trainability",
    title="Trainability by expert",
    reading="An expert whose line has stopped moving, or has fallen far below its own peak, has little left to "
    "learn and may be frozen; a cross marks where that was done.",
    missing=missing,
    draw=draw,
    caption=caption,
)
