"""Freeze policies: rules that read an expert's probes and say whether it freezes or thaws."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mocte_ds.config import FreezeConfig
from mocte_ds.errors import ConfigError
from mocte_ds.registry import OFF, POLICIES

# One probe is noisy: the same expert's lambda jumps by a factor of two between neighbouring probes.
SMOOTHING = 3
# Share of the budget that must have gone by since emergence, and that must be left for a thaw.
MIN_AGE, LEFT_FOR_THAW = 0.02, 0.1
# An eigenvalue is exact to this part of itself. Smaller changes of lambda count as none, or the rounding of another
# number of ranks would be taken for learning.
RESOLUTION = 1e-4


@dataclass(frozen=True)
class Probe:
    """What one check measured on one expert."""

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
    """Rollback progress: loss reduction since the last check, in nats per probe token."""
    fair: float | None = None
    """Mean progress of its bank's experts."""


def comparable(history: Sequence[Probe], reads: Sequence[str] = ()) -> list[Probe]:
    """The probes that can be compared with the newest one; empty if that one is not finite.

    They were measured on equally many rows, and everything that the policy reads from them is finite.

    Args:
        history: all probes, oldest first.
        reads: fields of a probe that the policy reads besides its value; None (not measured) passes.
    """
    usable = [probe for probe in history if _finite(probe, reads)]
    if not usable or usable[-1] is not history[-1]:
        return []
    return [probe for probe in usable if probe.tokens == history[-1].tokens]


def _finite(probe: Probe, reads: Sequence[str]) -> bool:
    return all(x is None or math.isfinite(x) for x in (probe.value, *(getattr(probe, name) for name in reads)))


@dataclass(frozen=True)
class Decision:
    """What a policy decides about one expert."""

    action: Literal["keep", "freeze", "thaw"]
    reason: str = ""
    """Why, with the numbers that decided."""


KEEP = Decision("keep")


@dataclass(frozen=True)
class Case:
    """What a rule may look at: one expert after its newest probe."""

    history: Sequence[Probe]
    """Its comparable probes since emergence, oldest first; never empty."""
    peers: Sequence[float]
    """Newest finite values of the block's experts, measured on equally many rows."""
    who: tuple[int, int]
    """Block and expert."""
    start: float
    """Share of the budget at which the expert began to train."""
    config: FreezeConfig
    seed: int
    """Seed of the run, for rules that draw at random."""

    def before(self, probes: int) -> "Case":
        """The same expert as it was some probes ago."""
        return replace(self, history=self.history[: len(self.history) - probes])


@dataclass(frozen=True)
class Rule:
    """When an expert freezes."""

    test: Callable[[Case], str | None]
    """The reason to freeze now, with the numbers that decided, or None."""
    in_a_row: bool = True
    """Whether it must hold at `freeze.checks` checks in a row, or at one (False)."""
    may_thaw: bool = False
    """Whether a frozen expert thaws, once, if lambda comes back (docs/method.md, section 5)."""
    reads: tuple[str, ...] = ()
    """Fields of :class:`Probe` that it reads besides `value`; with "progress" every check measures it."""


_NEVER = Rule(lambda case: None)


def policy(
    name: str, *, in_a_row: bool = True, may_thaw: bool = False, reads: Sequence[str] = ()
) -> Callable[[Callable[[Case], str | None]], Callable[[Case], str | None]]:
    """Decorator that makes a function a freeze policy, `freeze.policy` in the config (docs/extending.md).

    The function gets a :class:`Case` and returns the reason to freeze the expert now, or None. It must be a pure
    function: every rank calls it with the same numbers and must get the same answer.

    Args:
        name: in the config.
        in_a_row: see :class:`Rule`.
        may_thaw: see :class:`Rule`.
        reads: see :class:`Rule`.

    Raises:
        ConfigError: the name is taken, or a probe has no such field.
    """

    def add(test: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
        fields = Probe.__dataclass_fields__
        for field in reads:
            if field not in fields:
                raise ConfigError(f"the freeze policy {name!r} reads {field!r}; a probe has {', '.join(fields)}.")
        POLICIES.register(name, origin=test)(Rule(test, in_a_row, may_thaw, tuple(reads)))
        return test

    return add


def rule_of(name: str) -> Rule:
    """The rule of a policy; that of "off" reads nothing and never freezes.

    Raises:
        ConfigError: no such policy; with the names that there are.
    """
    return _NEVER if name == OFF else POLICIES.get(name, "mocte.freeze.policy")


class Policy:
    """A rule with its thresholds; every method is a pure function of an expert's history."""

    def __init__(self, config: FreezeConfig, seed: int = 0) -> None:
        """Look the rule up.

        Args:
            config: with the rule's name and thresholds.
            seed: of the run.

        Raises:
            ConfigError: an unknown name.
        """
        self.config, self.seed = config, seed
        self.rule = rule_of(config.policy)

    def decide(
        self,
        history: Sequence[Probe],
        born_share: float,
        peers: Sequence[float],
        who: tuple[int, int],
        frozen: bool,
        since: int = -1,
    ) -> Decision:
        """Decision on one expert after its newest probe.

        Probes that cannot be compared with the newest one do not count, see :func:`comparable`.

        Args:
            history: its probes since emergence, oldest first.
            born_share: share of the budget at emergence.
            peers: newest values of the block's experts, measured on as many rows as this one's.
            who: block and expert.
            frozen: whether it is frozen now.
            since: optimizer step of its last change of mode. What was measured before has no part in the decision to
                change it again, except for the peak.
        """
        config, rule = self.config, self.rule
        history = comparable(history, rule.reads)
        fresh = [probe for probe in history if probe.step > since]
        if not fresh:
            return KEEP
        now = fresh[-1].share
        if frozen:
            return self._thaw(history, len(fresh)) if rule.may_thaw and now < 1.0 - LEFT_FOR_THAW else KEEP
        young = len(fresh) < config.after_checks or now - born_share < MIN_AGE
        if young or now > config.until:
            return KEEP
        start = born_share if fresh == history else fresh[0].share
        finite = [p for p in peers if math.isfinite(p)]
        case = Case(history, finite, who, start, config, self.seed)
        in_a_row = config.checks if rule.in_a_row else 1
        if len(fresh) < in_a_row or len(history) - in_a_row + 1 < SMOOTHING:
            return KEEP
        reasons = [rule.test(case.before(back)) for back in range(in_a_row)]
        if not all(reasons):
            return KEEP
        times = f", {in_a_row} checks in a row" if in_a_row > 1 else ""
        return Decision("freeze", f"{reasons[0]}{times}")

    def _thaw(self, history: Sequence[Probe], fresh: int) -> Decision:
        """Thaw if lambda was over 2 alpha of its peak (large alpha: halfway to the peak) at each of the last checks."""
        alpha, checks = self.config.alpha, self.config.checks
        bound = min(2 * alpha, (1 + alpha) / 2)
        levels = smoothed([probe.value for probe in history])
        if fresh < checks or max(levels) <= 0:
            return KEEP
        lowest = min(levels[-checks:]) / max(levels)
        if lowest <= bound:
            return KEEP
        return Decision(
            "thaw", f"lambda is back at {lowest:.2f} of its peak, over {bound:.2f}, {checks} checks in a row"
        )


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
