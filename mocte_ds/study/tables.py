"""The results of a study as tables, with the spread between seeds and differences taken seed by seed."""

import math
from collections.abc import Sequence
from statistics import mean

from mocte_ds.report.markup import Table
from mocte_ds.study.clocks import CLOCKS, at_edge, best_rates, times
from mocte_ds.study.plan import Study
from mocte_ds.study.results import RunResult

_LEAST_SAVING = 0.01
"""Percent under which a saving is none."""

_LOSSES = """\
Means over seeds ± half of the range between them; a dash: there is no such number.

- **learning rate**: of the best of equal trials; *edge*: it is the largest or the smallest that was tried, and a better
  one may lie beyond
- **loss**: validation at the end, nats per token"""
_AGAINST = """
- **vs {base}**: loss less the baseline's, seed by seed (below 0 is better); **p**: of a paired t-test over the seeds,
  two-sided
- **x tokens, x FLOPs, x seconds**: what the baseline, run to several budgets with a schedule of its own each, needs for
  the arm's final loss, over what the arm spent (above 1 the arm is faster). *>*: more than its longest run; *<*: less
  than its shortest. All by the seeds that both have; the baseline keeps its learning rate in longer runs. FLOPs hold
  MO-CTE's own work. Seconds are of one machine, which may have had other work"""


class Results:
    """The runs of a study that are done, by what they are for."""

    def __init__(self, study: Study, runs: Sequence[RunResult]) -> None:
        self.study = study
        self.trials = [run for run in runs if run.trial]
        compared = [run for run in runs if not run.trial]
        self.by_arm = {arm.name: [r for r in compared if r.arm == arm.name and r.budget == 1] for arm in study.arms}
        self.by_arm = {name: own for name, own in self.by_arm.items() if own}
        finite = {name: [run for run in own if not run.diverged] for name, own in self.by_arm.items()}
        self.finite = {name: own for name, own in finite.items() if own}
        """The same without runs that diverged."""
        self.domains = list(dict.fromkeys(name for own in self.by_arm.values() for run in own for name in run.domains))
        self.baseline = [run for run in compared if run.arm == study.baseline and not run.diverged]
        """Of all budgets."""
        self.beside = {run.seed: run for run in self.baseline if run.budget == 1}
        """The baseline's run by seed."""

    def gaps(self, own: Sequence[RunResult]) -> list[float]:
        """Losses less the baseline's of the same seed."""
        return [run.loss - self.beside[run.seed].loss for run in own if run.seed in self.beside and not run.diverged]

    def domain_gaps(self, own: Sequence[RunResult], domain: str) -> list[float]:
        """The same on one domain."""
        pairs = [(run.domains, self.beside[run.seed].domains) for run in own if run.seed in self.beside]
        return [mine[domain] - base[domain] for mine, base in pairs if domain in mine and domain in base]


def all_tables(study: Study, runs: Sequence[RunResult]) -> list[Table]:
    """Every table that has rows.

    Args:
        study: names and order of the arms, and the baseline.
        runs: of any of its runs; arms without one have no row.
    """
    results = Results(study, runs)
    makers = (_losses, _budgets, _domains, _costs, _freezing, _trials)
    return [table for table in (make(results) for make in makers) if table.rows]


def _losses(results: Results) -> Table:
    base = results.study.baseline
    head = ["arm", "seeds", "learning rate", "loss"]
    if results.beside:
        head += [f"vs {base}", "p", *(f"x {clock}" for clock in CLOCKS)]
    rows = []
    for name, own in results.by_arm.items():
        tried = " (edge)" if at_edge(name, own[0].rate, results.trials) else ""
        row = [name, str(len(own)), f"{own[0].rate:g}{tried}", _number([run.loss for run in own], ".4f")]
        if results.beside:
            gaps = results.gaps(own)
            found = [times(own, results.baseline, clock) for clock in range(len(CLOCKS))]
            row += [_number(gaps, "+.4f"), _probability(gaps), *("-" if t is None else str(t) for t in found)]
        rows.append(row)
    return Table("losses", "Losses", head, rows, _LOSSES + (_AGAINST.format(base=base) if results.beside else ""))


def _budgets(results: Results) -> Table:
    rows = []
    for budget in sorted({run.budget for run in results.baseline}):
        own = [run for run in results.baseline if run.budget == budget]
        per = mean(run.tokens / run.active for run in own)
        row = [
            f"{budget:g}",
            str(len(own)),
            _number([run.loss for run in own], ".4f"),
            f"{own[0].tokens:,}",
            f"{per:.1f}",
        ]
        rows.append([*row, f"{mean(run.flops for run in own):.4g}", f"{mean(run.seconds for run in own):.0f}"])
    head = ["budget", "seeds", "loss", "tokens", "tokens per parameter", "FLOPs", "seconds"]
    title = f"The baseline ({results.study.baseline}) by budget"
    return Table("budgets", title, head, rows if len(rows) > 1 else [], "Each budget has a schedule of its own.")


def _domains(results: Results) -> Table:
    rows = []
    for arm, own in results.by_arm.items():
        cells = [_number(results.domain_gaps(own, name), "+.3f") for name in results.domains]
        if results.beside and arm != results.study.baseline:
            rows.append([arm, *cells])
    return Table(
        "domains",
        "Losses by domain",
        ["arm", *results.domains],
        rows,
        f"Validation loss less that of {results.study.baseline}, seed by seed, nats per token.",
    )


def _costs(results: Results) -> Table:
    rows = []
    for name, own in results.finite.items():
        rows.append(
            [
                name,
                f"{own[0].parameters / 1e6:.3g}",
                f"{own[0].active / 1e6:.3g}",
                f"{mean(run.tokens / run.active for run in own):.1f}",
                f"{mean(run.flops for run in own):.4g}",
                f"{100 * mean(run.own_flops / run.flops for run in own):.2f} %",
                _number([run.optimizer_bytes / 1e6 for run in own], ".1f"),
                _number([run.imbalance for run in own if run.imbalance is not None], ".2f"),
                _number([run.churn for run in own if run.churn is not None], ".2f"),
                f"{sum(run.detected for run in own)} of {sum(run.emerged for run in own)}",
            ]
        )
    head = ["arm", "parameters (M)", "active (M)", "tokens per active", "FLOPs", "own work", "optimizer MB", "load"]
    return Table(
        "costs",
        "What the arms are and cost",
        [*head, "churn", "detected"],
        rows,
        """\
- **parameters, active**: all at the end, and those that a token is computed with, the output matrix but not the input
  embedding among them
- **FLOPs**: all that training spent; **own work**: MO-CTE's share of them; **optimizer MB**: masters and moments at the
  end, over all ranks
- **load**: the busiest expert's tokens over the mean; **churn**: share of probe tokens that changed their expert since
  emergence; runs have a probe set with freezing or with `mocte.probe_tokens`
- **detected**: blocks that emerged because clusters were found, of all that emerged, all seeds together""",
    )


def _freezing(results: Results) -> Table:
    rows = []
    for name, own in results.finite.items():
        pairs = [(run, results.beside[run.seed]) for run in own if run.seed in results.beside]
        if not any(run.frozen or run.freezes for run in own):
            continue
        cells = []
        if pairs:
            lost = mean(run.loss - base.loss for run, base in pairs)
            gross = 100 * mean(run.wgrad_saved / base.flops for run, base in pairs)
            flops = 100 * mean(1 - run.flops / base.flops for run, base in pairs)
            state = 100 * mean(1 - run.mean_optimizer_bytes / base.mean_optimizer_bytes for run, base in pairs)
            cells = [f"{lost / s:+.4f} ({s:.2f} %)" if s > _LEAST_SAVING else "-" for s in (gross, flops, state)]
        not_spent = 100 * mean(run.wgrad_saved / (run.flops + run.wgrad_saved) for run in own)
        rows.append([name, _number([run.frozen for run in own], ".3g"), f"{not_spent:.2f} %", *(cells or ["-"] * 3)])
    head = ["arm", "frozen", "not spent", "nats / % not spent", "nats / % FLOPs", "nats / % bytes"]
    return Table(
        "freezing",
        "What freezing bought",
        head,
        rows,
        """\
- **frozen**: experts at the end; **not spent**: weight gradients of frozen experts, over what would have been spent
  with them
- **nats / % not spent**: loss over the baseline's for each percent of its FLOPs that weight gradients of frozen experts
  would have been (in brackets: how many percent); **nats / % FLOPs**: for each percent that was spent less, own work
  counted; **nats / % bytes**: the same for the optimizer's bytes, mean over the run""",
    )


def _trials(results: Results) -> Table:
    rates, best = sorted({run.rate for run in results.trials}), best_rates(results.trials)
    rows = []
    for arm in results.study.arms:
        own = {run.rate: run.loss for run in results.trials if run.arm == arm.name}
        if own:
            cells = [_number([own[rate]] if rate in own else [], ".4f") for rate in rates]
            known = arm.name in best and len(own) >= len(results.study.rates)
            rows.append([arm.name, *cells, f"{best[arm.name]:g}" if known else "-"])
    steps = next((run.steps for run in results.trials), 0)
    legend = (
        f"Validation loss after {steps} steps, with a schedule of that length, first seed. Every arm has equal trials."
    )
    return Table(
        "trials", "Trials of the learning rate", ["arm", *(f"{rate:g}" for rate in rates), "best"], rows, legend
    )


def _probability(gaps: Sequence[float]) -> str:
    """Of a mean difference as large by chance; of the baseline with itself none."""
    if len(gaps) < 2 or not any(gaps):
        return "-"
    from scipy.stats import ttest_1samp

    return f"{ttest_1samp(gaps, 0.0).pvalue:.2g}"


def _number(values: Sequence[float], form: str) -> str:
    """Mean, and half of the range where there are several."""
    if not values:
        return "-"
    if not math.isfinite(sum(values)):
        return "diverged"
    text = f"{mean(values):{form}}"
    if len(values) < 2:
        return text
    return f"{text} ± {(max(values) - min(values)) / 2:{form.lstrip('+')}}"
