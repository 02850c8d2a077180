"""Derived seeds: no two parts of runs with neighbouring seeds share one."""

import hashlib

from mocte_ds.seeds import derived_seed


def test_neighbouring_runs_share_no_seed() -> None:
    seeds = [derived_seed(run, "rank", rank) for run in range(64) for rank in range(64)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds), "what torch takes"


def test_parts_count_each() -> None:
    assert len({derived_seed(1), derived_seed(1, "a"), derived_seed(1, "a", 1), derived_seed(1, "b", 1)}) == 4


def test_the_same_on_every_machine() -> None:
    # Not Python's hash(), which differs between processes.
    digest = hashlib.sha256(b"3/rank/1").digest()
    assert derived_seed(3, "rank", 1) == sum(byte << 8 * i for i, byte in enumerate(digest[:8])) >> 1
