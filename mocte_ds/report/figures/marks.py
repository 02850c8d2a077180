"""Marks of what happened (emergence, freeze, thaw) on figures over time."""

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from mocte_ds.report.figures.palette import INK, depth_color
from mocte_ds.report.reader import Row, Run

KINDS = {"emergence": ("o", "emergence"), "freeze": ("v", "freeze"), "thaw": ("^", "thaw")}


def emergence_lines(axis: Axes, run: Run, block: int | None = None) -> None:
    """A dashed line at each emergence, of all blocks or of one."""
    for event in run.of_kind("emergence"):
        if block is None or event.get("block") == block:
            axis.axvline(event["tokens"], color=INK, lw=0.9, ls=(0, (4, 3)), zorder=1.5)


def event_strip(axis: Axes, run: Run, narrow: bool) -> None:
    """A strip with one row a kind of event and one mark an event, coloured by the block's depth."""
    rows = list(KINDS)
    order = {block: place for place, block in enumerate(run.blocks)}
    for height, kind in enumerate(reversed(rows)):
        events = run.of_kind(kind)
        for event in events:
            color = depth_color(order.get(event.get("block"), 0), len(order))
            axis.plot(event["tokens"], height, KINDS[kind][0], color=color, ms=6, mec="white", mew=0.6, clip_on=False)
        for together in _neighbours(events, run.tokens * (0.13 if narrow else 0.05)):
            text = event_name(together[0]) if len(together) == 1 else f"{len(together)}×"
            middle = sum(event["tokens"] for event in together) / len(together)
            label = axis.annotate(text, (middle, height), (0, 5), textcoords="offset points", fontsize=7, ha="center")
            label.set_path_effects([withStroke(linewidth=2, foreground="white")])
    axis.set_ylim(-0.6, len(rows) - 0.2)
    axis.set_yticks(range(len(rows)), [f"{kind} ({len(run.of_kind(kind))})" for kind in reversed(rows)])
    axis.set_ylabel("event (count)")
    axis.grid(axis="y", visible=True)


def _neighbours(events: list[Row], gap: float) -> list[list[Row]]:
    """Events too near to each other for a name each, together."""
    groups: list[list[Row]] = []
    for event in sorted(events, key=lambda event: event["tokens"]):
        if groups and event["tokens"] - groups[-1][-1]["tokens"] < gap:
            groups[-1].append(event)
        else:
            groups.append([event])
    return groups


def event_name(event: Row) -> str:
    """Short name of whom an event is about: ``b0`` a block, ``b0e2`` its expert 2."""
    expert = event.get("expert")
    return f"b{event.get('block')}" + (f"e{expert}" if expert is not None else "")
