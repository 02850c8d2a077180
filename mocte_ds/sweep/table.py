"""The results of a sweep as a table, with the spread between seeds and the exchange rate against a baseline."""

from collections.abc import Sequence
from statistics import mean

from mocte_ds.sweep.plan import Sweep
from mocte_ds.sweep.results import RunResult
from mocte_ds.sweep.trials import best_trials

_HEAD = ["arm", "seeds", "loss", "vs {}", "FLOPs", "optimizer MB", "frozen", "detected", "load", "churn"]
_HEAD += ["own work", "not spent"]
_RATES = ["nats / % not spent", "nats / % FLOPs", "nats / % bytes"]
_LEAST_SAVING = 0.01
"""Percent under which a saving is none."""

LEGEND = """\
Means over seeds ± half of the range between them; a dash: nothing was saved, or there is no such number.

- **loss**: validation at the end, nats a token; **vs**: less the baseline's, seed by seed (below 0 is better)
- **FLOPs**: all that training spent; **own work**: MO-CTE's share of them; **not spent**: weight gradients of frozen
  experts, over what would have been spent with them
- **optimizer MB**: masters and moments at the end, over all ranks; **frozen**: experts at the end
- **detected**: blocks that emerged because clusters were found, of all that emerged, all seeds together
- **load**: the busiest expert's tokens over the mean; **churn**: share of probe tokens that changed their expert since
  emergence; runs have a probe set with freezing or with `mocte.probe_tokens`
- **nats / % not spent**: loss over the baseline's for each percent of its FLOPs that weight gradients of frozen experts
  would have been (in brackets: how many percent); **nats / % FLOPs**: for each percent that was spent less, own work
  counted; **nats / % bytes**: the same for the optimizer's bytes, mean over the run"""


def markdown_table(sweep: Sweep, results: Sequence[RunResult]) -> str:
    """One row an arm, means over its seeds; what differs by seed stands behind the mean as the half range.

    Against the baseline differences are taken seed by seed; for the columns see :data:`LEGEND`.

    Args:
        sweep: names and order of the arms, and the baseline.
        results: of any of its runs; arms without one have no row.
    """
    by_arm = {arm.name: [r for r in results if r.arm == arm.name] for arm in sweep.arms}
    base = {result.seed: result for result in by_arm.get(best_trials(sweep, results).get(sweep.baseline or "", ""), [])}
    compared = bool(base)
    head = [name.format(sweep.baseline) for name in _HEAD if compared or "{}" not in name]
    rows = [head + (_RATES if compared else [])]
    for name, own in by_arm.items():
        if own:
            rows.append(_row(name, own, base))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _row(name: str, own: list[RunResult], base: dict[int, RunResult]) -> list[str]:
    pairs = [(result, base[result.seed]) for result in own if result.seed in base]
    cells = [name, str(len(own)), _number([r.loss for r in own], ".4f")]
    if base:
        cells.append(_number([r.loss - b.loss for r, b in pairs], "+.4f"))
    cells += [
        f"{mean(r.flops for r in own):.4g}",
        _number([r.optimizer_bytes / 1e6 for r in own], ".1f"),
        _number([r.frozen for r in own], ".3g"),
        f"{sum(r.detected for r in own)} of {sum(r.emerged for r in own)}",
        _number([r.imbalance for r in own if r.imbalance is not None], ".2f"),
        _number([r.churn for r in own if r.churn is not None], ".2f"),
        f"{100 * mean(r.own_flops / r.flops for r in own):.2f} %",
        f"{100 * mean(r.wgrad_saved / (r.flops + r.wgrad_saved) for r in own):.2f} %",
    ]
    if base:
        lost = mean(r.loss - b.loss for r, b in pairs) if pairs else 0.0
        gross = 100 * mean(r.wgrad_saved / b.flops for r, b in pairs) if pairs else 0.0
        flops = 100 * mean(1 - r.flops / b.flops for r, b in pairs) if pairs else 0.0
        state = 100 * mean(1 - r.mean_optimizer_bytes / b.mean_optimizer_bytes for r, b in pairs) if pairs else 0.0
        savings = (gross, flops, state)
        cells += [f"{lost / saved:+.4f} ({saved:.2f} %)" if saved > _LEAST_SAVING else "-" for saved in savings]
    return cells


def _number(values: Sequence[float], form: str) -> str:
    """Mean, and half of the range where there are several."""
    if not values:
        return "-"
    text = f"{mean(values):{form}}"
    if len(values) < 2:
        return text
    return f"{text} ± {(max(values) - min(values)) / 2:{form.lstrip('+')}}"
