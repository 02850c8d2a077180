"""Times mixture layers in turns, in one process or in several that share the experts."""

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.benchmark.measure.clock import Clock, median_ratio
from mocte_ds.benchmark.measure.layer_arms import LayerSizes, make_arms, tokens_and_gate
from mocte_ds.dist.collectives import wait_for_all
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.errors import MocteError

_WARM = 2
"""Turns before the clock: kernels are chosen and memory is touched."""


def run_rank(sizes: LayerSizes, device: str, repeats: int) -> dict[str, Any]:
    """Time every arm once a turn, so that other work on the machine falls on all of them.

    Args:
        sizes: of the layers.
        device: `cpu` or `cuda`.
        repeats: turns that count.

    Returns:
        "arms": for each the median of its seconds, and of its ratios to `slices` and `dense` of the same turn; "rows":
        tokens of each expert; what the device is.

    Raises:
        MocteError: a block sends tokens elsewhere than was planned.
    """
    import deepspeed

    deepspeed.init_distributed(verbose=False)  # takes over the process group
    world = mesh_of_processes().world
    torch.manual_seed(0)
    clock = Clock(device)
    hidden, gate = tokens_and_gate(sizes, world.rank, clock.device)
    arms = make_arms(sizes, gate, clock.device)
    gradient = torch.randn_like(hidden)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(_WARM + repeats):
        for name, arm in arms.items():
            wait_for_all(world)
            taken, _ = clock.once(partial(_forward_and_backward, arm, hidden, gradient))
            if turn >= _WARM:
                seconds[name].append(taken)
    rows = arms["block"].layer.banks[0].deepspeed_moe.exp_counts.tolist()
    if rows != sizes.rows():
        raise MocteError(f"the block sent {rows} tokens to its experts, not {sizes.rows()}.")
    return {
        "arms": {
            name: {
                "seconds": statistics.median(values),
                "over_slices": median_ratio(values, seconds["slices"]),
                "over_dense": median_ratio(values, seconds["dense"]),
            }
            for name, values in seconds.items()
        },
        "rows": rows,
        "device": clock.name(),
        "threads": torch.get_num_threads(),
    }


def _forward_and_backward(arm: nn.Module, hidden: Tensor, gradient: Tensor) -> None:
    """As in the middle of a model; gradients are dropped, as at the end of a step."""
    inputs = hidden.detach().requires_grad_()
    arm(inputs).backward(gradient)
    for parameter in arm.parameters():
        parameter.grad = None
