"""Every exchange between ranks, named for what the ranks agree on; without a process group each does nothing."""

from mocte_ds.dist.collectives import (
    from_rank_zero,
    gather_objects,
    gather_rows,
    max_over_ranks,
    require_same,
    sum_over_ranks,
    world,
)

__all__ = [
    "from_rank_zero",
    "gather_objects",
    "gather_rows",
    "max_over_ranks",
    "require_same",
    "sum_over_ranks",
    "world",
]
