"""Figure: training loss and validation loss by domain over tokens, with emergences and freezes."""

import numpy as np
from matplotlib.figure import Figure

from mocte_ds.report.facts import setting
from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.layout import label_ends, sheet, token_axis
from mocte_ds.report.figures.marks import KINDS, emergence_lines, event_strip
from mocte_ds.report.figures.palette import INK, category_color, category_marker
from mocte_ds.report.reader import Run
from mocte_ds.report.wording import decimal, integer, listing, plural

TRAINING = "#b9bec6"


def missing(run: Run) -> str | None:
    if not any(row.get("loss") is not None for row in run.metrics):
        return "no step has a finite loss in the log."
    return None


def draw(run: Run, narrow: bool) -> Figure:
    figure = sheet(narrow, 4.6 if not narrow else 5.0)
    loss, strip = figure.subplots(2, 1, sharex=True, height_ratios=[4.2, 1])
    tokens = [row["tokens"] for row in run.metrics]
    values = np.array([np.nan if row.get("loss") is None else row["loss"] for row in run.metrics], dtype=float)
    loss.plot(tokens, values, color=TRAINING, lw=0.8)
    drawn = [values]
    for index, domain in enumerate(run.domains):
        x, y = validation_series(run, domain)
        if not x:
            continue
        drawn.append(np.array(y))
        loss.plot(x, y, color=category_color(index), marker=category_marker(index), ms=4, mec="white", mew=0.5)
    x, y = validation_series(run, "mean")
    if x:
        loss.plot(x, y, color=INK, lw=1.2, ls=":")
        drawn.append(np.array(y))
    emergence_lines(loss, run)
    emergence_lines(strip, run)
    event_strip(strip, run, narrow)
    strip.set_xlabel(token_axis(strip, run.tokens))
    everything = np.concatenate(drawn)
    low, high = np.nanmin(everything), np.nanmax(everything)
    loss.set_ylim(low - 0.04 * (high - low + 1e-6), high + 0.04 * (high - low + 1e-6))
    loss.set_ylabel("loss (nats per token)")
    finite = values[np.isfinite(values)]
    labels = [(finite[-1], "training", TRAINING)]
    for index, domain in enumerate(run.domains):
        _, y = validation_series(run, domain)
        if y:
            labels.append((y[-1], domain, category_color(index)))
    _, y = validation_series(run, "mean")
    if y:
        labels.append((y[-1], "mean (dotted)", INK))
    label_ends([(loss, labels)])
    return figure


def validation_series(run: Run, domain: str) -> tuple[list[int], list[float]]:
    """(tokens, loss) of one domain, or of ``mean``."""
    rows = [row for row in run.validations if row["validation"].get(domain) is not None]
    return [row["tokens"] for row in rows], [row["validation"][domain] for row in rows]


def caption(run: Run) -> str:
    step = run.tokens_per_step
    text = (
        f"Grey: training loss of {plural(len(run.metrics), 'step')}"
        + (f" of {integer(step)} tokens each" if step else "")
        + ", every step as logged, not smoothed."
    )
    rows = run.validations
    if rows:
        domains = [name for name in run.domains if validation_series(run, name)[0]]
        last = rows[-1]["validation"].get("mean")
        text += f" Lines with marks: held-out text of {plural(len(domains), 'domain')}"
        sequences, context = setting(run, "sequences_per_domain"), setting(run, "training", "context")
        if sequences and context:
            text += f" (at most {sequences} sequences of {context} tokens each)"
        text += f", {plural(len(rows), 'evaluation')}"
        text += f"; the last mean is {decimal(last)} nats." if last is not None else "."
    else:
        text += " The log has no validation yet."
    counts = {kind: len(run.of_kind(kind)) for kind in KINDS}
    text += (
        f" Strip below: {listing([plural(count, kind) for kind, count in counts.items()])}; dashed lines: emergence."
    )
    return text


FIGURE = FigureKind(
    name="loss",
    title="Loss by domain",
    reading="Lower is better; the loss should not jump where a dashed line stands, because experts start as copies of "
    "the dense FFN that they replace.",
    missing=missing,
    draw=draw,
    caption=caption,
)
