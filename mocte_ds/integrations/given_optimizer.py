"""An optimizer that somebody else has made, such as Trainer, for an engine whose parameters come and go."""

from collections.abc import Callable
from typing import Any

import torch

from mocte_ds.errors import ConfigError


def refilled(optimizer: torch.optim.Optimizer) -> tuple[Callable[[Any], torch.optim.Optimizer], list[dict[str, Any]]]:
    """What mocte_ds.initialize takes in place of an optimizer that has not stepped.

    Args:
        optimizer: over the model's parameters before its blocks are attached; emptied.

    Returns:
        A callable that gives the same object with other groups, and its groups with all their options.

    Raises:
        ConfigError: it has a state already, or a scheduler that would go on with groups that are gone.
    """
    if optimizer.state:
        raise ConfigError("the optimizer has stepped already; make a new one, and go on from a checkpoint.")
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise ConfigError(
            "the optimizer has a scheduler, which cannot follow experts that emerge and freeze; name the scheduler in "
            "the DeepSpeed config, or hand over a callable that makes one of an optimizer."
        )
    given = [dict(group) for group in optimizer.param_groups]

    def make(groups: Any) -> torch.optim.Optimizer:
        optimizer.param_groups.clear()
        for group in groups:
            optimizer.add_param_group(group)
        return optimizer

    return make, given
