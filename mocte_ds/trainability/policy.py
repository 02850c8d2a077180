"""Who stops training and who may start again: rules that read numbers and nothing else."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mocte_ds.errors import ConfigError

# One probe is noisy: the same expert's lambda jumps by a factor of two between neighbouring probes.
SMOOTHING = 3
PROGRESS_CHECKS = 5
# Share of the budget that must have gone by since emergence, and that must be left for a thaw.
MIN_AGE, LEFT_FOR_THAW = 0.02, 0.1
# An eigenvalue is exact to this part of itself. Smaller changes of lambda count as none, or the rounding of another
# number of ranks would be taken for learning.
RESOLUTION = 1e-4


@dataclass(frozen=True)
class Probe:
    """What a check measured of one expert."""

    step: int
    """Optimizer step of the check."""
    share: float
    """Share of the budget that was done."""
    value: float
    """lambda_max of its kernel over the number of rows. It depends on that number: only probes of equally many rows
    are compared."""
    tokens: int
    """Rows that it was measured on."""
    gradient_norm: float
    """L2 norm of its gradient at the last step, over all ranks and without fp16's loss scale."""
    progress: float | None = None
    """Rollback progress: nats a token of the probe set that its tokens cost less than with the last check's experts."""
    fair: float | None = None
    """Mean progress of its bank's experts."""


def comparable(history: Sequence[Probe], policy: str = "trainability") -> list[Probe]:
    """The probes that can be compared with the newest one; none where it is itself of no use.

    They were measured on as many rows, and what the policy reads of them is finite.
    """
    usable = [probe for probe in history if _finite(probe, policy)]
    if not usable or usable[-1] is not history[-1]:
        return []
    return [probe for probe in usable if probe.tokens == history[-1].tokens]


def _finite(probe: Probe, policy: str) -> bool:
    read = {"grad-norm": (probe.gradient_norm,), "progress": (probe.progress, probe.fair)}.get(policy, ())
    return all(x is None or math.isfinite(x) for x in (probe.value, *read))


@dataclass(frozen=True)
class Decision:
    """What a policy wants of one expert."""

    action: Literal["keep", "freeze", "thaw"]
    reason: str = ""
    """With the numbers that decided."""


KEEP = Decision("keep")


@dataclass(frozen=True)
class _Case:
    """What a rule may look at."""

    history: Sequence[Probe]
    peers: Sequence[float]
    who: tuple[int, int]
    start: float
    """Share of the budget at which the expert began to train."""

    def before(self, probes: int) -> "_Case":
        """The same some probes ago."""
        return replace(self, history=self.history[: len(self.history) - probes])


@dataclass(frozen=True)
class Policy:
    """One rule with its thresholds; every method is a pure function of an expert's history."""

    name: str
    alpha: float
    beta: float
    gamma: float
    checks: int
    after_checks: int
    until: float
    seed: int

    def decide(
        self,
        history: Sequence[Probe],
        born_share: float,
        peers: Sequence[float],
        who: tuple[int, int],
        frozen: bool,
        since: int = -1,
    ) -> Decision:
        """What to do with one expert after its newest probe.

        Probes that cannot be compared with the newest one do not count, see :func:`comparable`.

        Args:
            history: its probes since emergence, oldest first.
            born_share: share of the budget at emergence.
            peers: newest values of the block's experts, of as many rows as this one's.
            who: block and expert.
            frozen: whether it is frozen now.
            since: optimizer step of its last change of mode. What was measured before has no part in the decision to
                change it again, but for the peak.
        """
        history = comparable(history, self.name)
        fresh = [probe for probe in history if probe.step > since]
        if not fresh:
            return KEEP
        now = fresh[-1].share
        if frozen:
            return (
                self._thaw(history, len(fresh)) if self.name == "trainability" and now < 1.0 - LEFT_FOR_THAW else KEEP
            )
        young = len(fresh) < self.after_checks or now - born_share < MIN_AGE
        if young or now > self.until:
            return KEEP
        rule = _RULES[self.name]
        case = _Case(
            history, [p for p in peers if math.isfinite(p)], who, born_share if fresh == history else fresh[0].share
        )
        in_a_row = 1 if self.name in ("paper", "random") else self.checks
        if len(fresh) < in_a_row or len(history) - in_a_row + 1 < SMOOTHING:
            return KEEP
        found = [rule(self, case.before(back)) for back in range(in_a_row)]
        if None in found:
            return KEEP
        times = f", {in_a_row} checks in a row" if in_a_row > 1 else ""
        return Decision("freeze", f"{found[0]}{times}")

    def _thaw(self, history: Sequence[Probe], fresh: int) -> Decision:
        """Back over twice alpha of the peak (half way to the peak for a large alpha) at all of the last checks."""
        bound = min(2 * self.alpha, (1 + self.alpha) / 2)
        levels = smoothed([probe.value for probe in history])
        if fresh < self.checks or max(levels) <= 0:
            return KEEP
        lowest = min(levels[-self.checks :]) / max(levels)
        if lowest <= bound:
            return KEEP
        return Decision(
            "thaw", f"lambda is back at {lowest:.2f} of its peak, over {bound:.2f}, {self.checks} checks in a row"
        )


def make_policy(
    name: str,
    alpha: float,
    beta: float,
    checks: int,
    until: float,
    seed: int,
    after_checks: int = 5,
    gamma: float = 0.5,
) -> Policy:
    """A policy by its name in the config.

    Args:
        name: `trainability`, `progress`, `paper`, `grad-norm`, `inverted`, `random`.
        alpha: LEVEL threshold, a share of the peak.
        beta: RATE threshold, a share of the first (or largest) change.
        checks: checks in a row that must agree.
        until: share of the budget after which nothing is frozen.
        seed: of `random`.
        after_checks: probes that an expert has before it can be frozen.
        gamma: PROGRESS threshold, a share of the fair part.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in _RULES:
        raise ConfigError(f"mocte.freeze.policy = {name!r} is not one of {[*_RULES, 'off']}.")
    return Policy(name, alpha, beta, gamma, checks, after_checks, until, seed)


def smoothed(values: Sequence[float]) -> list[float]:
    """Running mean over the last three values."""
    return [
        sum(values[max(0, i + 1 - SMOOTHING) : i + 1]) / len(values[max(0, i + 1 - SMOOTHING) : i + 1])
        for i in range(len(values))
    ]


def level(values: Sequence[float]) -> float:
    """Smoothed newest value as a share of the smoothed peak: LEVEL compares it with alpha."""
    means = smoothed(values)
    return means[-1] / max(means) if max(means) > 0 else 0.0


def rate(values: Sequence[float]) -> float:
    """| Delta_t - Delta_(t-1) | over the largest Delta so far, Delta_t = |lambda_t - lambda_0|, all smoothed.

    After Modular Adaptive Training (Shi et al., arXiv 2405.07527), which divides by Delta_1; a first change that
    happens to be small would switch the test off for good. Where no Delta is over RESOLUTION of the peak, 0.
    """
    means = smoothed(values)
    deltas = [abs(value - means[0]) for value in means]
    moved = len(deltas) > 1 and max(deltas) > RESOLUTION * max(means)
    return abs(deltas[-1] - deltas[-2]) / max(deltas) if moved else 0.0


def _trainability(policy: Policy, case: _Case) -> str | None:
    """RATE and LEVEL: lambda has stopped changing, well under what it was."""
    values = [probe.value for probe in case.history]
    now, change = level(values), rate(values)
    if max(values) > 0 and now < policy.alpha and change < policy.beta:
        return (
            f"lambda at {now:.2f} of its peak (alpha {policy.alpha:g}), changing by {change:.3f} (beta {policy.beta:g})"
        )
    return None


def progress_share(history: Sequence[Probe]) -> float | None:
    """Part of an expert in the loss decrease of its last checks, over its fair part; None if the loss did not fall."""
    known = [probe for probe in history[-PROGRESS_CHECKS:] if probe.progress is not None and probe.fair is not None]
    fair = sum(probe.fair for probe in known)
    if len(known) < PROGRESS_CHECKS or fair <= 0:
        return None
    return sum(probe.progress for probe in known) / fair


def _progress(policy: Policy, case: _Case) -> str | None:
    """RATE and PROGRESS: lambda has stopped changing, and the expert's tokens hardly get better any more."""
    share, change = progress_share(case.history), rate([probe.value for probe in case.history])
    if share is not None and share < policy.gamma and change < policy.beta:
        return f"progress {share:.2f} of the fair part (gamma {policy.gamma:g}), lambda changing by {change:.3f}"
    return None


def _paper(policy: Policy, case: _Case) -> str | None:
    """LEVEL or RATE on single probes, once, as in Modular Adaptive Training."""
    values = [probe.value for probe in case.history]
    largest = max([*values, *case.peers])
    if values[-1] < policy.alpha * largest:
        return f"level: lambda at {values[-1] / largest:.2f} of the block's largest (alpha {policy.alpha:g})"
    deltas = [abs(value - values[0]) for value in values]
    if len(deltas) > 2 and deltas[1] > RESOLUTION * largest and abs(deltas[-1] - deltas[-2]) / deltas[1] < policy.beta:
        return f"rate: lambda changing by {abs(deltas[-1] - deltas[-2]) / deltas[1]:.4f} (beta {policy.beta:g})"
    return None


def _grad_norm(policy: Policy, case: _Case) -> str | None:
    """The control that people use: the gradient's norm under alpha of its peak."""
    norms = [probe.gradient_norm for probe in case.history]
    now = level(norms)
    return (
        f"gradient norm at {now:.2f} of its peak (alpha {policy.alpha:g})"
        if max(norms) > 0 and now < policy.alpha
        else None
    )


def _inverted(policy: Policy, case: _Case) -> str | None:
    """The opposite of `trainability`: experts near their peak and still changing."""
    values = [probe.value for probe in case.history]
    now, change = level(values), rate(values)
    if now >= 1.0 - policy.alpha and change >= policy.beta:
        return f"inverted: lambda at {now:.2f} of its peak, changing by {change:.3f}"
    return None


def _random(policy: Policy, case: _Case) -> str | None:
    """Every expert draws its time of freezing: half of them by half way from its start to the end of freezing.

    The time is exponential, (until - start) / 2 * log2(1 / u): it depends neither on how often checks come nor on
    probes that are missing. Those for which it comes before an expert may freeze, freeze as soon as they may.
    """
    draw = hashlib.sha256(f"{policy.seed}/{case.who}/{case.start:.9f}".encode()).digest()[:8]
    u = (int.from_bytes(draw) + 1) / 2.0**64
    due = case.start - math.log2(u) * (policy.until - case.start) / 2
    return f"random: drew {due:.3f} of the budget" if case.history[-1].share >= due else None


_RULES: dict[str, Callable[[Policy, _Case], str | None]] = {
    "trainability": _trainability,
    "progress": _progress,
    "paper": _paper,
    "grad-norm": _grad_norm,
    "inverted": _inverted,
    "random": _random,
}
