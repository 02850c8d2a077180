"""Who stops training and who may start again: rules that read numbers and nothing else."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mocte_ds.errors import ConfigError

# One probe is noisy: the same expert's lambda jumps by a factor of two between neighbouring probes.
SMOOTHING = 3
PROGRESS_CHECKS = 5
# Share of the budget that must have gone by since emergence, and that must be left for a thaw.
MIN_AGE, LEFT_FOR_THAW = 0.02, 0.1


@dataclass(frozen=True)
class Probe:
    """What a check measured of one expert."""

    step: int
    """Optimizer step of the check."""
    share: float
    """Share of the budget that was done."""
    value: float
    """lambda_max of its kernel a row, mean over its replicas."""
    tokens: int
    """Rows that it was measured on."""
    gradient_norm: float
    """L2 norm of its gradient at the last step."""
    progress: float | None = None
    """Rollback progress: nats a token of the probe set that its tokens cost less than with the last check's experts."""
    fair: float | None = None
    """Mean progress of its bank's experts."""


@dataclass(frozen=True)
class Decision:
    """What a policy wants of one expert."""

    action: Literal["keep", "freeze", "thaw"]
    reason: str = ""
    """With the numbers that decided."""


KEEP = Decision("keep")


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
        self, history: Sequence[Probe], born_share: float, peers: Sequence[float], who: tuple[int, int], frozen: bool
    ) -> Decision:
        """What to do with one expert after its newest probe.

        Args:
            history: its probes since emergence, oldest first.
            born_share: share of the budget at emergence.
            peers: newest values of the block's experts.
            who: block and expert.
            frozen: whether it is frozen now.
        """
        if not history:
            return KEEP
        now = history[-1].share
        if frozen:
            return self._thaw(history) if self.name == "trainability" and now < 1.0 - LEFT_FOR_THAW else KEEP
        young = len(history) < self.after_checks or now - born_share < MIN_AGE
        if young or now > self.until:
            return KEEP
        rule: Callable[..., str | None] = _RULES[self.name]
        in_a_row = 1 if self.name in ("paper", "random") else self.checks
        reason = None
        for back in range(in_a_row):
            past = history[: len(history) - back]
            if len(past) < SMOOTHING:
                return KEEP
            found = rule(self, past, peers, who)
            if found is None:
                return KEEP
            reason = reason or found
        times = f", {in_a_row} checks in a row" if in_a_row > 1 else ""
        return Decision("freeze", f"{reason}{times}")

    def _thaw(self, history: Sequence[Probe]) -> Decision:
        """Back over twice alpha of the peak (half way to the peak for a large alpha) at all of the last checks."""
        bound = min(2 * self.alpha, (1 + self.alpha) / 2)
        levels = smoothed([probe.value for probe in history])
        if len(levels) < self.checks or max(levels) <= 0:
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
    happens to be small would switch the test off for good.
    """
    means = smoothed(values)
    deltas = [abs(value - means[0]) for value in means]
    return abs(deltas[-1] - deltas[-2]) / max(deltas) if len(deltas) > 1 and max(deltas) > 0 else 0.0


def _trainability(
    policy: Policy, history: Sequence[Probe], _peers: Sequence[float], _who: tuple[int, int]
) -> str | None:
    """RATE and LEVEL: lambda has stopped changing, well under what it was."""
    values = [probe.value for probe in history]
    now, change = level(values), rate(values)
    if now < policy.alpha and change < policy.beta:
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


def _progress(policy: Policy, history: Sequence[Probe], _peers: Sequence[float], _who: tuple[int, int]) -> str | None:
    """RATE and PROGRESS: lambda has stopped changing, and the expert's tokens hardly get better any more."""
    share, change = progress_share(history), rate([probe.value for probe in history])
    if share is not None and share < policy.gamma and change < policy.beta:
        return f"progress {share:.2f} of the fair part (gamma {policy.gamma:g}), lambda changing by {change:.3f}"
    return None


def _paper(policy: Policy, history: Sequence[Probe], peers: Sequence[float], _who: tuple[int, int]) -> str | None:
    """LEVEL or RATE on single probes, once, as in Modular Adaptive Training."""
    values = [probe.value for probe in history]
    largest = max([*values, *peers])
    if values[-1] < policy.alpha * largest:
        return f"level: lambda at {values[-1] / largest:.2f} of the block's largest (alpha {policy.alpha:g})"
    deltas = [abs(value - values[0]) for value in values]
    if len(deltas) > 2 and deltas[1] > 0 and abs(deltas[-1] - deltas[-2]) / deltas[1] < policy.beta:
        return f"rate: lambda changing by {abs(deltas[-1] - deltas[-2]) / deltas[1]:.4f} (beta {policy.beta:g})"
    return None


def _grad_norm(policy: Policy, history: Sequence[Probe], _peers: Sequence[float], _who: tuple[int, int]) -> str | None:
    """The control that people use: the gradient's norm under alpha of its peak."""
    now = level([probe.gradient_norm for probe in history])
    return f"gradient norm at {now:.2f} of its peak (alpha {policy.alpha:g})" if now < policy.alpha else None


def _inverted(policy: Policy, history: Sequence[Probe], _peers: Sequence[float], _who: tuple[int, int]) -> str | None:
    """The opposite of `trainability`: experts near their peak and still changing."""
    values = [probe.value for probe in history]
    now, change = level(values), rate(values)
    if now >= 1.0 - policy.alpha and change >= policy.beta:
        return f"inverted: lambda at {now:.2f} of its peak, changing by {change:.3f}"
    return None


def _random(policy: Policy, history: Sequence[Probe], _peers: Sequence[float], who: tuple[int, int]) -> str | None:
    """A coin that freezes half of the experts by half way from now to the end of freezing."""
    last, before = history[-1].share, history[-2].share
    chance = 1.0 - 0.5 ** (2 * (last - before) / max(policy.until, 1e-9))
    text = f"{policy.seed}/{who}/{history[-1].step}"
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2.0**64
    return f"random: drew {draw:.3f} under {chance:.3f}" if draw < chance else None


_RULES: dict[str, Callable[..., str | None]] = {
    "trainability": _trainability,
    "progress": _progress,
    "paper": _paper,
    "grad-norm": _grad_norm,
    "inverted": _inverted,
    "random": _random,
}
