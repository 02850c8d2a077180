"""Figure: training loss and validation loss by domain over tokens, with emergences and freezes."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from mocte_ds.report.facts import fact, is_of_script
from mocte_ds.report.figures.drawing import FigureKind
from mocte_ds.report.figures.labels import label_ends
from mocte_ds.report.figures.layout import legend, sheet, token_axis
from mocte_ds.report.figures.marks import KINDS, emergence_lines, event_names, event_strip, legend_of_events
from mocte_ds.report.figures.palette import INK, category_color, category_marker
from mocte_ds.report.run import Run
from mocte_ds.report.wording import decimal, integer, listing, plural

TRAINING = "#b9bec6"


def missing(run: Run) -> str | None:
    if not np.isfinite(column(run, "loss")).any():
        return "no step has a finite loss in the log."
    return None


def column(run: Run, name: str) -> np.ndarray:
    """(steps,) one number of every step; NaN where the log has none."""
    return np.array([np.nan if row.get(name) is None else row[name] for row in run.metrics], dtype=float)


def validation_series(run: Run, domain: str) -> tuple[list[int], list[float]]:
    """(tokens, loss) of one domain, or of ``mean``."""
    rows = [row for row in run.validations if row["validation"].get(domain) is not None]
    return [row["tokens"] for row in rows], [row["validation"][domain] for row in rows]


def validated_domains(run: Run) -> list[str]:
    """Domains with at least one validation loss."""
    return [domain for domain in run.domains if validation_series(run, domain)[0]]


def sample(run: Run, domains: Sequence[str]) -> str:
    """Sample sizes of training and validation."""
    text = f"n = {plural(len(run.metrics), 'step')}"
    if run.tokens_per_step:
        text += f" of {integer(run.tokens_per_step)} tokens"
    evaluations = max((len(validation_series(run, domain)[0]) for domain in domains), default=0)
    if not evaluations:
        return f"{text}; no validation in the log"
    text += f"; {plural(evaluations, 'validation')} of {plural(len(validated_domains(run)), 'domain')}"
    sequences, context = fact(run, "evaluation", "sequences_per_domain"), fact(run, "training", "context")
    if sequences and context:
        text += f", at most {sequences} × {context} tokens each"
    return text


def draw(run: Run, narrow: bool) -> Figure:
    domains = validated_domains(run)
    figure = sheet(narrow, 5.2 if narrow else 4.8, sample(run, domains))
    loss, strip = figure.subplots(2, 1, sharex=True, height_ratios=[4.2, 1])
    values = column(run, "loss")
    loss.plot(column(run, "tokens"), values, color=TRAINING, lw=0.8)
    labels = [(values[np.isfinite(values)][-1], "training", TRAINING)]
    for domain in domains:
        x, y = validation_series(run, domain)
        color, marker = _look(run, domain)
        loss.plot(x, y, color=color, marker=marker, ms=4, mec="white", mew=0.5)
        labels.append((y[-1], domain, color))
    x, y = validation_series(run, "mean")
    if x:
        loss.plot(x, y, color=INK, lw=1.2, ls=":")
        labels.append((y[-1], "mean (dotted)", INK))
    emergence_lines(loss, run)
    event_strip(strip, run, narrow)
    strip.set_xlabel(token_axis(strip, run.tokens))
    loss.set_ylabel("loss (nats per token)")
    legend(figure, narrow, {"training, every step": {"color": TRAINING}} | legend_of_events(run, "emergence"))
    label_ends([(loss, labels)])
    return figure


def _look(run: Run, domain: str) -> tuple[str, str]:
    index = run.domains.index(domain)
    return category_color(index), category_marker(index)


def caption(run: Run) -> str:
    text = "Grey: training loss of every step as logged, not smoothed."
    domains, means = validated_domains(run), validation_series(run, "mean")[1]
    if domains:
        text += " Lines with marks: loss on held-out text, by domain."
        text += f" The last mean over the domains is {decimal(means[-1])} nats per token." if means else ""
    else:
        text += " The log has no validation" + ("." if is_of_script(run) else " yet.")
    counts = {kind: len(run.of_kind(kind)) for kind in KINDS}
    text += f" Strip below: {listing([plural(count, kind) for kind, count in counts.items()])}"
    if counts["freeze"] or counts["thaw"]:
        text += " (b0 is block 0, b0e2 its expert 2; 3×: three that are too close for names)."
        return text + "".join(f" {kind.capitalize()}s: {event_names(run, kind)}." for kind in KINDS if counts[kind])
    return f"{text} (b0 is block 0; 3×: three that are too close for names)." if counts["emergence"] else f"{text}."


FIGURE = FigureKind(
    name="loss",
    title="Loss by domain",
    reading="Lower is better. The loss should not jump at a dashed line, because experts start as what they replace or "
    "as nothing added; and not at a freeze, because freezing changes no weight.",
    missing=missing,
    draw=draw,
    caption=caption,
)
