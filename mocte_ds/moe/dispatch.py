"""Brings every token to its experts and the outputs back, dropping none: sort, all-to-all, expert after expert."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.dist.exchange import exchange_counts, exchange_rows
from mocte_ds.moe.rows import gather_chunks, scatter_chunks
from mocte_ds.watch import part

# Shapes: T tokens, k experts per token, d features, E experts.


def route_through(
    features: Tensor,
    index: Tensor,
    weight: Tensor | None,
    experts: Sequence[nn.Module],
    num_experts: int,
    group: Any,
    ep_size: int,
    observe: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the outputs of each token's experts.

    Args:
        features: (T, d) of this rank.
        index: (T, k) int64 global experts of each token, all different.
        weight: (T, k) what their outputs are multiplied by, in fp32; None: 1.
        experts: this rank's experts; rank r of the group holds the global experts r*L ... r*L + L-1.
        num_experts: E, all ranks together.
        group: expert-parallel process group, None with ep_size 1.
        ep_size: ranks in the group.
        observe: called with (local expert, its rows (n, d)) before each expert runs.

    Returns:
        (T, d) outputs in the order of ``features``, and (E,) int64 choices of each expert by this rank's tokens.
    """
    choices = index.flatten()
    with part("dispatch"):
        order = torch.argsort(choices, stable=True)
        counts = torch.bincount(choices, minlength=num_experts)
    if ep_size == 1:
        outputs = _run(features, order, counts.tolist(), index.shape[1], weight, experts, observe)
        return outputs, counts
    local = num_experts // ep_size
    by_rank = counts.view(ep_size, local)
    arriving = exchange_counts(by_rank, group)
    send, receive = by_rank.sum(1).tolist(), arriving.sum(1).tolist()
    if torch.is_grad_enabled() and not features.requires_grad:
        # Nothing below trains. Ranks whose experts are all frozen would build no graph, and the others' backward
        # pass would wait for them.
        features = features.detach().requires_grad_()
    with part("dispatch"):
        rows = gather_chunks(features, order, [len(order)], index.shape[1], fill=False)[0]
    arrived = exchange_rows(rows, send, receive, group)
    # Rows arrive by source rank, then expert; experts want them by expert, then source rank.
    chunk = torch.arange(ep_size * local, device=features.device).repeat_interleave(arriving.reshape(-1))
    by_expert = torch.argsort((chunk % local) * ep_size + chunk // local, stable=True)
    sizes = arriving.sum(0).tolist()
    processed = _run(arrived, by_expert, sizes, 1, None, experts, observe)
    outputs = exchange_rows(processed, receive, send, group)
    # In pieces only where weights need room in fp32.
    sizes = [len(order)] if weight is None else counts.tolist()
    with part("dispatch"):
        return scatter_chunks(outputs.split(sizes), order, sizes, index.shape[1], weight), counts


def _run(
    rows: Tensor,
    order: Tensor,
    sizes: list[int],
    k: int,
    weight: Tensor | None,
    experts: Sequence[nn.Module],
    observe: Callable[[int, Tensor], None] | None,
) -> Tensor:
    """Apply each expert to its rows, and add up each token's outputs.

    An expert without rows still runs on padding, so that it stays in the graph and no rank waits.
    """
    with part("dispatch"):
        chunks, outputs = gather_chunks(rows, order, sizes, k), list[Tensor]()
    for number, (chunk, expert) in enumerate(zip(chunks, experts, strict=True)):
        if observe is not None:
            observe(number, chunk[: sizes[number]])
        output = expert(chunk)
        outputs.append(output[0] if isinstance(output, tuple) else output)
    with part("dispatch"):
        return scatter_chunks(outputs, order, sizes, k, weight)
