"""Marks of what happened (emergence, freeze, thaw) on figures over time; they look the same on all figures."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from mocte_ds.report.figures.palette import INK
from mocte_ds.report.run import Row, Run

KINDS = {"emergence": "o", "freeze": "v", "thaw": "^"}
"""Marker of each kind of event."""
_NAMED = 40
EMERGENCE_LINE: dict[str, Any] = {"color": INK, "lw": 0.8, "ls": (0, (4, 3))}


def legend_of_events(run: Run, *kinds: str) -> dict[str, dict[str, Any]]:
    """Entries of a legend for the kinds of events that the run has."""
    mark = {"color": INK, "ls": "", "ms": 6, "mec": "white", "mew": 0.6}
    looks = {kind: EMERGENCE_LINE if kind == "emergence" else {**mark, "marker": KINDS[kind]} for kind in kinds}
    return {kind: look for kind, look in looks.items() if run.of_kind(kind)}


def emergence_lines(axis: Axes, run: Run, block: int | None = None) -> None:
    """A dashed line at each emergence, of all blocks or of one."""
    for tokens in {event["tokens"] for event in run.of_kind("emergence") if block in (None, event.get("block"))}:
        axis.axvline(tokens, zorder=1.5, **EMERGENCE_LINE)


def expert_events(run: Run, block: int) -> list[Row]:
    """Freezes and thaws of a block's experts."""
    events = run.of_kind("freeze", "thaw")
    return [event for event in events if event.get("block") == block and isinstance(event.get("expert"), int)]


def event_strip(axis: Axes, run: Run, narrow: bool) -> None:
    """A strip with one row a kind of event and one mark an event, with the event's name where there is room."""
    heights = {kind: height for height, kind in enumerate(reversed(KINDS))}
    for kind, height in heights.items():
        events = run.of_kind(kind)
        for event in events:
            axis.plot(event["tokens"], height, KINDS[kind], color=INK, ms=6, mec="white", mew=0.6, clip_on=False)
        for together in _neighbours(events, run.tokens * (0.16 if narrow else 0.055)):
            middle = sum(event["tokens"] for event in together) / len(together)
            label = axis.annotate(
                _names(together), (middle, height), (0, 5), textcoords="offset points", fontsize=7, ha="center"
            )
            label.set_path_effects([withStroke(linewidth=2, foreground="white")])
    axis.set_ylim(-0.6, len(heights) - 0.2)
    axis.set_yticks(list(heights.values()), [f"{kind} ({len(run.of_kind(kind))})" for kind in heights])
    axis.set_ylabel("event (count)")


def event_names(run: Run, kind: str) -> str:
    """Names of all events of a kind in order, as the strip has them, of very many the first ones."""
    names = [_names([event]) for event in run.of_kind(kind)]
    more = f" and {len(names) - _NAMED} more, in the table of events" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _neighbours(events: Sequence[Row], gap: float) -> list[list[Row]]:
    """Events too near to each other for a name each, together."""
    groups: list[list[Row]] = []
    for event in sorted(events, key=lambda event: event["tokens"]):
        if groups and event["tokens"] - groups[-1][-1]["tokens"] < gap:
            groups[-1].append(event)
        else:
            groups.append([event])
    return groups


def _names(events: Sequence[Row]) -> str:
    """``b0`` for a block, ``b0e2`` for its expert 2, ``3×`` for three events together."""
    if len(events) > 1:
        return f"{len(events)}×"
    expert = events[0].get("expert")
    return f"b{events[0].get('block')}" + (f"e{expert}" if expert is not None else "")
