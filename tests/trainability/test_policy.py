"""Policies decide as their documented rules say: at the right check, and not before, after or under other names."""

from dataclasses import replace

import pytest

from mocte_ds.config import FreezeConfig
from mocte_ds.errors import ConfigError
from mocte_ds.trainability import Policy, Probe
from mocte_ds.trainability.policy import level, rate, smoothed
from mocte_ds.trainability.rules import progress_share

ALPHA, BETA, CHECKS, UNTIL = 0.2, 0.05, 3, 0.9
FALLING = [100.0, 80.0, 50.0, 25.0, 12.0] + [10.0] * 20


def history(values: list[float], norms: list[float] | None = None, first: float = 0.1) -> list[Probe]:
    """A probe every 0.8 % of the budget."""
    norms = norms or [1.0] * len(values)
    pairs = enumerate(zip(values, norms, strict=True))
    return [Probe(4 * i, first + 0.008 * i, value, 64, norm) for i, (value, norm) in pairs]


def policy(name: str = "trainability", **changes: float) -> Policy:
    seed = changes.pop("seed", 0)
    given = {"alpha": ALPHA, "beta": BETA, "checks": CHECKS, "until": UNTIL, **changes}
    return Policy(FreezeConfig(policy=name, **given), seed)


def first_freeze(
    rule: Policy, probes: list[Probe], born: float = 0.1, who: tuple[int, int] = (0, 0), seen: int | None = None
) -> int | None:
    """Number of probes at which the policy freezes for the first time; of the last ``seen`` alone, for a long list."""
    for n in range(1, len(probes) + 1):
        known = probes[max(0, n - (seen or n)) : n]
        if rule.decide(known, born, [probe.value for probe in known], who, False).action == "freeze":
            return n
    return None


def test_smoothing_level_and_rate() -> None:
    assert smoothed([6.0, 0.0, 3.0, 9.0]) == [6.0, 3.0, 3.0, 4.0]
    assert level([6.0, 0.0, 3.0, 9.0]) == pytest.approx(4 / 6)
    # Smoothed 6, 3, 3, 4: Delta 0, 3, 3, 2.
    assert rate([6.0, 0.0, 3.0, 9.0]) == pytest.approx(1 / 3)
    assert rate([5.0, 5.0, 5.0]) == 0.0 and level([0.0]) == 0.0


def test_trainability_needs_both_and_some_checks_in_a_row() -> None:
    probes = history(FALLING)
    ready = [n for n in range(1, len(FALLING)) if level(FALLING[:n]) < ALPHA and rate(FALLING[:n]) < BETA]
    assert first_freeze(policy(), probes) == ready[0] + CHECKS - 1
    assert first_freeze(policy(checks=1), probes) == ready[0]
    decision = policy().decide(probes, 0.1, [], (0, 0), False)
    assert "of its peak (alpha 0.2)" in decision.reason and "3 checks in a row" in decision.reason
    # LEVEL without RATE: low, but jumping. RATE without LEVEL: flat at half of the peak.
    jumping = history([100.0, 100.0, 100.0] + [2.0, 2.0, 2.0, 32.0, 32.0, 32.0] * 4)
    assert first_freeze(policy(alpha=0.4, beta=0.01), jumping) is None
    assert first_freeze(policy(alpha=0.4, beta=0.5), jumping) is not None
    assert first_freeze(policy(), history([100.0] * 3 + [50.0] * 20)) is None


def test_scale_does_not_matter() -> None:
    for name in ("trainability", "paper", "grad-norm", "inverted"):
        small = first_freeze(policy(name), history(FALLING, FALLING))
        large = first_freeze(policy(name), history([1000 * v for v in FALLING], [1000 * v for v in FALLING]))
        assert small == large, name


def test_neither_too_young_nor_too_late() -> None:
    assert first_freeze(policy(after_checks=15), history(FALLING)) == 15
    # 2 % of the budget since emergence is 0.02 / 0.008 probes and a half.
    flat = history([100.0] + [1.0] * 20)
    assert first_freeze(policy("paper", after_checks=1), flat, born=0.1) == 4
    assert first_freeze(policy(), history(FALLING, first=0.89)) is None
    assert policy().decide([], 0.0, [], (0, 0), False).action == "keep"


def test_paper_is_level_or_rate_of_single_probes() -> None:
    paper = policy("paper", after_checks=1)
    assert first_freeze(paper, history([10.0, 20.0, 31.0, 45.0, 60.0, 76.0])) is None
    assert first_freeze(paper, history([10.0, 20.0, 31.0, 45.0, 60.0, 60.1])) == 6  # rate .1 / 10
    assert first_freeze(paper, history([100.0, 90.0, 80.0, 70.0, 19.0])) == 5
    # Under alpha of the block's largest, though not of its own peak.
    quiet = history([10.0, 11.0, 13.0, 16.0])
    assert paper.decide(quiet, 0.1, [16.0, 100.0], (0, 0), False).action == "freeze"
    assert paper.decide(quiet, 0.1, [16.0, 20.0], (0, 0), False).action == "keep"


def test_progress_needs_a_small_part_of_a_falling_loss_and_a_quiet_lambda() -> None:
    def probes(own: list[float], fair: list[float], values: list[float] | None = None) -> list[Probe]:
        made = history(values or [10.0, 12.0] + [12.0] * (len(own) - 2))
        return [replace(p, progress=o, fair=f) for p, o, f in zip(made, own, fair, strict=True)]

    little = probes([0.01] * 3 + [0.002] * 17, [0.01] * 20)
    assert progress_share(little[:8]) == pytest.approx(0.2) and progress_share(little[:4]) is None
    assert progress_share(little[:5]) == pytest.approx((3 * 0.01 + 2 * 0.002) / 0.05)
    # Under half of the fair part from the seventh probe on, when lambda has long been quiet; three in a row.
    assert progress_share(little[:6]) == pytest.approx(0.52)
    assert first_freeze(policy("progress", gamma=0.5), little) == 9
    assert "progress 0.20 of the fair part" in policy("progress").decide(little, 0.1, [], (0, 0), False).reason
    assert first_freeze(policy("progress"), probes([0.01] * 20, [0.01] * 20)) is None
    jumping = [10.0 + 5 * (-1) ** (i // 3) for i in range(20)]
    assert first_freeze(policy("progress", beta=0.01), probes([0.001] * 20, [0.01] * 20, jumping)) is None
    assert first_freeze(policy("progress"), probes([-0.01] * 20, [-0.001] * 20)) is None, "the loss did not fall"
    assert first_freeze(policy("progress"), history([10.0] * 20)) is None, "nothing was measured"


def test_controls() -> None:
    rising = [float(v) for v in range(1, 30)]
    assert first_freeze(policy("grad-norm"), history(rising, FALLING + [10.0] * 4)) is not None
    assert first_freeze(policy("grad-norm"), history(FALLING, [1.0] * len(FALLING))) is None
    assert first_freeze(policy("inverted", beta=0.01), history(rising)) is not None
    assert first_freeze(policy("inverted"), history(FALLING)) is None


def test_random_is_a_coin_that_everybody_sees_alike() -> None:
    probes = history([1.0] * 110, first=0.0)
    one, same, other = policy("random"), policy("random"), policy("random", seed=1)
    when, again, otherwise = (
        [first_freeze(rule, probes, 0.0, (b, k), seen=8) for b in range(20) for k in range(20)]
        for rule in (one, same, other)
    )
    assert when == again and when != otherwise
    # Half of those that are left within half of the time: .5 after .45 of the budget, .75 after .9.
    half = sum(n is not None and probes[n - 1].share <= 0.45 for n in when) / len(when)
    late = sum(n is not None for n in when) / len(when)
    assert 0.4 < half < 0.6 and 0.66 < late < 0.84


@pytest.mark.slow
@pytest.mark.parametrize("born", [0.1, 0.3, 0.6])
def test_random_freezes_half_by_half_way_whatever_the_birth(born: float) -> None:
    for every in (0.008, 0.02):  # how often checks come does not matter
        counts, rule = [0, 0], policy("random")
        probes = [Probe(i, born + every * i, 1.0, 64, 1.0) for i in range(int((1 - born) / every))]
        for k in range(2000):
            n = first_freeze(rule, probes, born, (0, k), seen=8)
            frozen_at = 1.0 if n is None else probes[n - 1].share
            counts[0] += frozen_at <= born + (UNTIL - born) / 2 + 1e-9
            counts[1] += frozen_at <= UNTIL
        # A check comes up to its distance late.
        late = every / (UNTIL - born)
        assert 0.46 - late < counts[0] / 2000 < 0.54 and 0.71 - late < counts[1] / 2000 < 0.79


@pytest.mark.parametrize("name", ["trainability", "paper", "inverted", "grad-norm", "progress"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_no_policy_decides_on_what_is_not_finite(name: str, bad: float) -> None:
    def probes(values: list[float]) -> list[Probe]:
        made = history(values, values)
        return [replace(p, progress=0.001 * p.value, fair=1.0) for p in made] if name == "progress" else made

    quiet = [100.0, 80.0, 50.0, 25.0] + [10.0] * 12
    rising = [10.0 * 1.3**i for i in range(16)]
    good = rising if name == "inverted" else quiet
    rule = policy(name, after_checks=1)
    assert rule.decide(probes(good), 0.1, [100.0], (0, 0), False).action == "freeze"
    # The newest is bad: nothing is decided, neither to freeze nor to thaw.
    for frozen in (False, True):
        assert rule.decide(probes([*good, bad]), 0.1, [100.0], (0, 0), frozen).action == "keep"
    # One between is left out: the same as if it had not been measured.
    place = len(good) // 2
    mixed = probes([*good[:place], bad, *good[place:]])
    without = [probe for i, probe in enumerate(mixed) if i != place]
    peers = [100.0, bad]
    assert rule.decide(mixed, 0.1, peers, (0, 0), False) == rule.decide(without, 0.1, [100.0], (0, 0), False)
    assert rule.decide([], 0.1, peers, (0, 0), False).action == "keep"
    for never in (probes([bad] * 12), history([0.0] * 12, [0.0] * 12)):
        assert rule.decide(never, 0.1, [bad, 0.0], (0, 0), False).action == "keep"
        assert rule.decide(never, 0.1, peers, (0, 0), True).action == "keep"


def test_probes_of_other_numbers_of_rows_are_not_compared() -> None:
    """lambda over n of one and the same expert falls with n: many more rows would look like an expert that is done."""
    few = [replace(probe, tokens=16) for probe in history([70.0] * 5)]
    many = [replace(probe, tokens=256, step=probe.step + 20) for probe in history([5.0] * 8, first=0.14)]
    for name in ("trainability", "paper", "inverted", "progress"):
        assert policy(name).decide([*few, *many], 0.1, [5.0], (0, 0), False).action == "keep", name
        assert policy(name).decide([*many, *few[:2]], 0.1, [70.0], (0, 0), True).action == "keep", name
    # After five probes on as many rows as now, decisions are those of these alone.
    falling = history(FALLING)
    mixed = [*few, *[replace(probe, step=probe.step + 20) for probe in falling]]
    assert first_freeze(policy(), mixed) == len(few) + first_freeze(policy(), falling)


def test_rounding_is_not_taken_for_learning() -> None:
    noise = [5.0 * (1 + 1e-6 * (-1) ** i * (i % 3)) for i in range(20)]
    assert rate(noise) == 0.0
    assert first_freeze(policy("inverted", beta=0.01), history(noise)) is None


def test_a_change_by_hand_is_not_undone_by_what_was_measured_before() -> None:
    # Frozen at its peak: the probes that would thaw it are all older.
    peak = history([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert policy().decide(peak, 0.1, [], (0, 0), True).action == "thaw"
    for n in range(3):
        later = peak + [replace(p, step=100 + i) for i, p in enumerate(history([6.0] * n, first=0.15))]
        assert policy().decide(later, 0.1, [], (0, 0), True, since=peak[-1].step).action == "keep"
    # Thawed while its lambda is low: it gets as many checks as a new one.
    low = history(FALLING)
    assert policy().decide(low, 0.1, [], (0, 0), False).action == "freeze"
    actions = []
    for n in range(7):
        after = [replace(p, step=200 + i) for i, p in enumerate(history([10.0] * n, first=0.4))]
        actions.append(policy().decide(low + after, 0.1, [], (0, 0), False, since=150).action)
    assert actions == ["keep"] * 5 + ["freeze"] * 2


def test_thaw() -> None:
    low, back = FALLING[:10], [60.0, 60.0, 60.0, 60.0, 60.0]
    rule = policy()
    assert rule.decide(history(low), 0.1, [], (0, 0), True).action == "keep"
    actions = [rule.decide(history(low + back[:n]), 0.1, [], (0, 0), True).action for n in range(6)]
    # The mean of three is over 2 alpha = .4 of the peak from the second on; three checks in a row must be.
    assert actions == ["keep", "keep", "keep", "keep", "thaw", "thaw"]
    assert rule.decide(history(low + back, first=0.8), 0.1, [], (0, 0), True).action == "keep", "too little is left"
    assert policy("paper").decide(history(low + back), 0.1, [], (0, 0), True).action == "keep"


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match="'progres' is not one of"):
        policy("progres")
