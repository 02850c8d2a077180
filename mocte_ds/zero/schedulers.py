"""Learning-rate schedulers keep one number per parameter group; these lists must follow when groups leave or enter."""

from collections.abc import Sequence
from typing import Any

_NOT_BY_GROUP = ("_schedulers", "_milestones")  # of torch's SequentialLR


def follow_groups(scheduler: Any, old_count: int, sources: Sequence[int]) -> None:
    """Rearrange every per-group list of a scheduler.

    Args:
        scheduler: any scheduler of torch or DeepSpeed (base_lrs, org_lrs, min_lrs, lr_lambdas, ...), or None.
        old_count: number of groups before.
        sources: for each group now, the group before whose entry it takes.
    """
    if scheduler is None:
        return
    for name, value in vars(scheduler).items():
        if isinstance(value, list) and len(value) == old_count and name not in _NOT_BY_GROUP:
            setattr(scheduler, name, [value[source] for source in sources])
    for inner in getattr(scheduler, "_schedulers", []):  # torch's SequentialLR and ChainedScheduler
        follow_groups(inner, old_count, sources)
