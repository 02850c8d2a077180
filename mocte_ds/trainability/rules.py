"""The freeze policies that come with the package (docs/method.md, section 5)."""

import hashlib
import math
from collections.abc import Sequence

from mocte_ds.trainability.policy import RESOLUTION, Case, Probe, level, policy, rate

PROGRESS_CHECKS = 5


@policy("trainability", may_thaw=True)
def _trainability(case: Case) -> str | None:
    """RATE and LEVEL: lambda has stopped changing, far below its peak."""
    values = [probe.value for probe in case.history]
    now, change = level(values), rate(values)
    alpha, beta = case.config.alpha, case.config.beta
    if max(values) > 0 and now < alpha and change < beta:
        return f"lambda at {now:.2f} of its peak (alpha {alpha:g}), changing by {change:.3f} (beta {beta:g})"
    return None


def progress_share(history: Sequence[Probe]) -> float | None:
    """An expert's part of the loss reduction at the last checks, over its fair part; None if the loss did not fall."""
    newest = history[-PROGRESS_CHECKS:]
    known = [(p.progress, p.fair) for p in newest if p.progress is not None and p.fair is not None]
    fair = sum(part for _, part in known)
    if len(known) < PROGRESS_CHECKS or fair <= 0:
        return None
    return sum(progress for progress, _ in known) / fair


@policy("progress", reads=["progress", "fair"])
def _progress(case: Case) -> str | None:
    """RATE and PROGRESS: lambda has stopped changing, and the loss of the expert's tokens hardly falls any more."""
    share, change = progress_share(case.history), rate([probe.value for probe in case.history])
    if share is not None and share < case.config.gamma and change < case.config.beta:
        return f"progress {share:.2f} of the fair part (gamma {case.config.gamma:g}), lambda changing by {change:.3f}"
    return None


@policy("paper", in_a_row=False)
def _paper(case: Case) -> str | None:
    """LEVEL or RATE on single probes, once, as in Modular Adaptive Training."""
    values = [probe.value for probe in case.history]
    largest = max([*values, *case.peers])
    if values[-1] < case.config.alpha * largest:
        return f"level: lambda at {values[-1] / largest:.2f} of the block's largest (alpha {case.config.alpha:g})"
    deltas = [abs(value - values[0]) for value in values]
    if (
        len(deltas) > 2
        and deltas[1] > RESOLUTION * largest
        and abs(deltas[-1] - deltas[-2]) / deltas[1] < case.config.beta
    ):
        return f"rate: lambda changing by {abs(deltas[-1] - deltas[-2]) / deltas[1]:.4f} (beta {case.config.beta:g})"
    return None


@policy("grad-norm", reads=["gradient_norm"])
def _grad_norm(case: Case) -> str | None:
    """The usual control: the gradient's norm is under alpha times its peak."""
    norms = [probe.gradient_norm for probe in case.history]
    now = level(norms)
    return (
        f"gradient norm at {now:.2f} of its peak (alpha {case.config.alpha:g})"
        if max(norms) > 0 and now < case.config.alpha
        else None
    )


@policy("inverted")
def _inverted(case: Case) -> str | None:
    """The opposite of `trainability`: freezes experts near their peak that still change."""
    values = [probe.value for probe in case.history]
    now, change = level(values), rate(values)
    if now >= 1.0 - case.config.alpha and change >= case.config.beta:
        return f"inverted: lambda at {now:.2f} of its peak, changing by {change:.3f}"
    return None


@policy("random", in_a_row=False)
def _random(case: Case) -> str | None:
    """Every expert draws its time of freezing: half of them freeze by half way from their start to the end of freezing.

    The time is exponential, (until - start) / 2 * log2(1 / u): it depends neither on how often checks come nor on
    probes that are missing. An expert that draws a time before it may freeze does so as soon as it may.
    """
    draw = hashlib.sha256(f"{case.seed}/{case.who}/{case.start:.9f}".encode()).digest()[:8]
    u = (int.from_bytes(draw) + 1) / 2.0**64
    due = case.start - math.log2(u) * (case.config.until - case.start) / 2
    return f"random: drew {due:.3f} of the budget" if case.history[-1].share >= due else None
