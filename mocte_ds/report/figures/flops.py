"""Figure: what the run spent its FLOPs on, and what freezing saved."""

from matplotlib.figure import Figure

from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.layout import sheet
from mocte_ds.report.figures.palette import INK, QUALITATIVE, SOFT
from mocte_ds.report.ledger import OWN_WORK, beside, overhead, saved, spent, total
from mocte_ds.report.reader import Run
from mocte_ds.report.wording import flops, percent


def missing(run: Run) -> str | None:
    return None if total(run) else "the run has not written its ledger of FLOPs yet."


def draw(run: Run, narrow: bool) -> Figure:
    rows = spent(run) + beside(run)
    figure = sheet(narrow, 0.7 + 0.28 * len(rows))
    axis = figure.subplots()
    whole = total(run)
    smallest = min(run.ledger[name] for name in rows if run.ledger[name] > 0) / whole
    floor = 10.0 ** (int(f"{smallest:e}".split("e")[1]) - 1)
    for height, name in enumerate(reversed(rows)):
        share = run.ledger[name] / whole
        axis.axhline(height, color="#eef0f3", lw=5, zorder=0.5)
        text = percent(share) if not narrow else percent(share, 1)
        if share <= 0:
            axis.annotate("none", (floor, height), (6, 0), textcoords="offset points", va="center", fontsize=8)
            continue
        hollow = name in beside(run)
        color = QUALITATIVE[1] if name in OWN_WORK else QUALITATIVE[0]
        color = {"wgrad_saved": QUALITATIVE[2], "validation": SOFT}.get(name, color)
        axis.plot(share, height, "o", ms=8, color=color, mfc="white" if hollow else color, mew=1.6)
        left = share > 0.02
        axis.annotate(
            text,
            (share, height),
            (-9 if left else 9, 0),
            textcoords="offset points",
            va="center",
            ha="right" if left else "left",
            fontsize=8,
            color=INK,
        )
    axis.set_xscale("log")
    axis.set_xlim(floor, 1.3)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_yticks(range(len(rows)), [name.replace("_", " ") for name in reversed(rows)])
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0, labelcolor=INK)
    axis.spines["left"].set_color(SOFT)
    axis.set_xlabel("share of all FLOPs spent (1 = all, log)")
    axis.set_ylabel("component")
    return figure


def caption(run: Run) -> str:
    whole = total(run)
    return (
        f"All {flops(whole)} FLOPs of {len(run.metrics):,} steps. Blue: the model's own work; orange: what MO-CTE "
        f"adds, {percent(overhead(run))} of all; open green: weight gradients that freezing saved, "
        f"{percent(saved(run))} of what would have been spent without it; open grey: beside training."
    )


FIGURE = FigureKind(
    name="flops",
    title="Ledger of FLOPs",
    reading="The axis is logarithmic, one grid line is a factor of ten; freezing pays in computation where the open "
    "circle lies right of the orange dots together.",
    missing=missing,
    draw=draw,
    caption=caption,
)
