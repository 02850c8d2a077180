"""Brings every token to its expert and its output back, drops nothing: sort, all-to-all, one expert after another."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.dist.exchange import exchange_counts, exchange_rows

# oneDNN compiles a kernel for every new number of rows; padding to multiples halves a step on a CPU (measured at d=64).
_CPU_ROW_MULTIPLE = 64


def route_through(
    features: Tensor,
    index: Tensor,
    experts: Sequence[nn.Module],
    num_experts: int,
    group: Any,
    ep_size: int,
    observe: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output of each token's expert.

    Args:
        features: (T, d) of this rank.
        index: (T,) int64 global expert of each token.
        experts: this rank's experts; rank r of the group holds the global experts r*L ... r*L + L-1.
        num_experts: E, all ranks together.
        group: expert-parallel process group, None with ep_size 1.
        ep_size: ranks in the group.
        observe: called with (local expert, its rows (n, d)) before each expert runs.

    Returns:
        (T, d) outputs in the order of ``features``, and (E,) int64 tokens sent to each expert by this rank.
    """
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=num_experts)
    rows = features[order]
    if ep_size == 1:
        outputs = _run(rows, counts.tolist(), experts, observe)
    else:
        local = num_experts // ep_size
        by_rank = counts.view(ep_size, local)
        arriving = exchange_counts(by_rank, group)
        send, receive = by_rank.sum(1).tolist(), arriving.sum(1).tolist()
        if torch.is_grad_enabled() and not rows.requires_grad:
            # Nothing below trains. Ranks whose experts are all frozen would build no graph, and the others' backward
            # pass would wait for them.
            rows = rows.detach().requires_grad_()
        arrived = exchange_rows(rows, send, receive, group)
        # Rows arrive by source rank, then expert; experts want them by expert, then source rank.
        chunk = torch.arange(ep_size * local, device=features.device).repeat_interleave(arriving.reshape(-1))
        by_expert = torch.argsort((chunk % local) * ep_size + chunk // local, stable=True)
        processed = _run(arrived[by_expert], arriving.sum(0).tolist(), experts, observe)
        outputs = exchange_rows(processed[torch.argsort(by_expert)], receive, send, group)
    return outputs[torch.argsort(order)], counts


def _run(
    rows: Tensor, sizes: list[int], experts: Sequence[nn.Module], observe: Callable[[int, Tensor], None] | None
) -> Tensor:
    """Apply each expert to its consecutive rows."""
    outputs = []
    for number, (chunk, expert) in enumerate(zip(rows.split(sizes), experts, strict=True)):
        if observe is not None:
            observe(number, chunk)
        outputs.append(_apply_padded(expert, chunk))
    return torch.cat(outputs)


def _apply_padded(expert: nn.Module, rows: Tensor) -> Tensor:
    """Expert of the rows. One without rows still runs on padding, so that it stays in the graph and no rank waits."""
    count = rows.shape[0]
    multiple = _CPU_ROW_MULTIPLE if rows.device.type == "cpu" else 1
    padding = max(multiple, -(-count // multiple) * multiple) - count
    if padding:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, padding))
    output = expert(rows)
    output = output[0] if isinstance(output, tuple) else output
    return output[:count]
