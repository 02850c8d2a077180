"""Figures of a study: final losses, losses by FLOPs, differences by domain, trials of the learning rate."""

import math
from collections.abc import Callable
from statistics import mean

import numpy as np
from matplotlib.figure import Figure

from mocte_ds.report.figures.layout import sheet
from mocte_ds.report.figures.palette import DIVERGING, INK, SOFT, category_color, category_marker
from mocte_ds.study.tables import Results

Draw = Callable[[Results], Figure | None]


def final_losses(results: Results) -> Figure | None:
    """Every arm's losses after the last step, a dot for each seed, the best arm on top."""
    order = sorted(results.finite, key=lambda arm: -mean(run.loss for run in results.finite[arm]))
    if not order:
        return None
    figure = sheet(False, 0.9 + 0.27 * len(order), f"n = {len(results.study.seeds)} seeds at most")
    axis = figure.subplots()
    for place, arm in enumerate(order):
        losses = [run.loss for run in results.finite[arm]]
        color = INK if arm == results.study.baseline else category_color(0)
        axis.plot(losses, [place] * len(losses), "o", color=color, ms=4, alpha=0.6)
        axis.plot(mean(losses), place, "|", color=color, ms=14, mew=2)
    for budget in sorted({run.budget for run in results.baseline}):
        level = mean(run.loss for run in results.baseline if run.budget == budget)
        axis.axvline(level, color=SOFT, lw=0.9, ls=":" if budget != 1 else "--", zorder=0)
        axis.annotate(
            f"{results.study.baseline} x {budget:g}",
            (level, 1),
            (2, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=7,
            color=SOFT,
            rotation=30,
        )
    axis.set_yticks(range(len(order)), order)
    axis.set_ylim(-0.6, len(order) - 0.4)
    axis.set_xlabel("validation loss at the end (nats per token)")
    return figure


def curves(results: Results) -> Figure | None:
    """Validation loss by the FLOPs spent, mean over seeds, of the baseline and the best arms."""
    known = {arm: own for arm, own in results.by_arm.items() if all(len(run.curve) > 1 for run in own)}
    best = sorted(known, key=lambda arm: mean(run.loss for run in known[arm]))[:7]
    shown = list(dict.fromkeys([arm for arm in (results.study.baseline,) if arm in known] + best))
    if not shown:
        return None
    figure = sheet(False, 3.6, "mean over seeds; the learning rate falls to the end, and the loss with it")
    axis = figure.subplots()
    for number, arm in enumerate(shown):
        own = known[arm]
        length = min(len(run.curve) for run in own)
        points = np.array([run.curve[:length] for run in own]).mean(axis=0)
        later = max(1, length // 8)  # the first fall hides everything after it
        look = {"color": INK, "lw": 2.0} if arm == results.study.baseline else {"color": category_color(number)}
        axis.plot(points[later:, 1], points[later:, 3], marker=category_marker(number), ms=3, label=arm, **look)
    for run in results.baseline:
        if run.budget != 1:
            axis.plot(run.flops, run.loss, "*", color=INK, ms=9)
            axis.annotate(f"x {run.budget:g}", (run.flops, run.loss), (4, 3), textcoords="offset points", fontsize=7)
    axis.set_xlabel("training FLOPs, MO-CTE's own work included")
    axis.set_ylabel("validation loss (nats per token)")
    axis.legend(fontsize=7.5, frameon=False)
    return figure


def by_domain(results: Results) -> Figure | None:
    """Losses less the baseline's by arm and domain."""
    names = results.domains
    arms = [arm for arm in results.by_arm if arm != results.study.baseline and results.beside]
    table = np.full((len(arms), len(names)), math.nan)
    for row, arm in enumerate(arms):
        for column, name in enumerate(names):
            gaps = results.domain_gaps(results.by_arm[arm], name)
            table[row, column] = mean(gaps) if gaps else math.nan
    if not np.isfinite(table).any():
        return None
    figure = sheet(False, 1.2 + 0.27 * len(arms), "mean over seeds")
    axis = figure.subplots()
    most = float(np.nanmax(np.abs(table))) or 1.0
    image = axis.imshow(table, cmap=DIVERGING, vmin=-most, vmax=most, aspect="auto")
    for row in range(len(arms)):
        for column in range(len(names)):
            value = table[row, column]
            if math.isfinite(value):
                color = "white" if abs(value) > 0.6 * most else INK
                axis.text(column, row, f"{value:+.2f}", ha="center", va="center", fontsize=7, color=color)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set_yticks(range(len(arms)), arms)
    axis.grid(visible=False)
    figure.colorbar(image, ax=axis, label=f"nats per token less {results.study.baseline}")
    return figure


def trials(results: Results) -> Figure | None:
    """Losses of the trials by learning rate."""
    if not results.trials:
        return None
    figure = sheet(False, 3.4, "one seed; one line per arm")
    axis = figure.subplots()
    for number, arm in enumerate(results.study.arms):
        points = sorted((run.rate, run.loss) for run in results.trials if run.arm == arm.name and not run.diverged)
        if points:
            look = (
                {"color": INK, "lw": 2.2} if arm.name == results.study.baseline else {"color": category_color(number)}
            )
            axis.plot(*zip(*points, strict=True), marker=category_marker(number), ms=4, label=arm.name, **look)
    axis.set_xscale("log")
    rates = sorted({run.rate for run in results.trials})
    axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axis.minorticks_off()
    axis.set_xlabel("largest learning rate")
    axis.set_ylabel("validation loss (nats per token)")
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


FIGURES: dict[str, tuple[str, str, Draw]] = {
    "losses": (
        "Losses at the end",
        "A dot is a seed, a bar the mean. Lines: the baseline run to several budgets, each with a schedule of its own. "
        "An arm left of a line x 2 has saved half of the baseline's tokens.",
        final_losses,
    ),
    "curves": (
        "Losses by computation",
        "Curves fall with the learning rate to the end, so only their ends compare. Stars: the baseline at other "
        "budgets.",
        curves,
    ),
    "domains": ("Where arms gain", "Below 0 an arm is better than the baseline on that domain.", by_domain),
    "trials": (
        "Trials of the learning rate",
        "Where a line falls to an end of the range, a better rate may lie beyond it.",
        trials,
    ),
}
"""By name: title, how to read it, and what draws it or finds nothing to draw."""
