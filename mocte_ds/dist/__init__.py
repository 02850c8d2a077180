"""Every exchange between ranks, named for what the ranks agree on; along an axis of one rank each does nothing."""

from mocte_ds.dist.collectives import (
    from_rank_zero,
    gather_objects,
    gather_rows,
    max_over_ranks,
    require_same,
    sum_over_ranks,
)
from mocte_ds.dist.mesh import Axis, Mesh, mesh_of_processes

__all__ = [
    "Axis",
    "Mesh",
    "from_rank_zero",
    "gather_objects",
    "gather_rows",
    "max_over_ranks",
    "mesh_of_processes",
    "require_same",
    "sum_over_ranks",
]
