"""Brings every token to its experts and the outputs back, dropping none: sort, all-to-all, expert after expert."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mocte_ds.dist.exchange import CountExchange, RowExchange
from mocte_ds.moe.rows import gather_chunks, padded_sizes, scatter_chunks
from mocte_ds.watch import part

# Shapes: T tokens, k experts per token, d features, E experts, L of them on each rank.


class Routed(NamedTuple):
    """What :func:`route_through` returns."""

    outputs: Tensor
    """(T, d) in the order of the features."""
    counts: Tensor
    """(E,) int64 choices of each expert by this rank's tokens."""
    beside: Tensor | None
    """What was computed beside."""


def route_through(
    features: Tensor,
    index: Tensor,
    weight: Tensor | None,
    experts: Sequence[nn.Module],
    num_experts: int,
    group: Any,
    ep_size: int,
    observe: Callable[[int, Tensor], None] | None = None,
    beside: Callable[[], Tensor] | None = None,
    early: int | None = None,
) -> Routed:
    """Weighted sum of the outputs of each token's experts.

    Args:
        features: (T, d) of this rank.
        index: (T, k) int64 global experts of each token, all different.
        weight: (T, k) what their outputs are multiplied by, in fp32; None: 1.
        experts: this rank's experts; rank r of the group holds the global experts r*L ... r*L + L-1.
        num_experts: E, all ranks together.
        group: expert-parallel process group, None with ep_size 1.
        ep_size: ranks in the group.
        observe: called with (local expert, its rows (n, d)) before each call of an expert; there may be two.
        beside: work that needs nothing of this, done while rows travel.
        early: this rank's tokens of its own experts do not travel; so many of these experts run on them while the
            others are on the way there, the rest while those are on the way back. None: all travel.
    """
    choices = index.flatten()
    with part("dispatch"):
        order = torch.argsort(choices, stable=True)
        counts = torch.bincount(choices, minlength=num_experts)
    if ep_size > 1:
        return _over_ranks(features, order, counts, index.shape[1], weight, experts, group, observe, beside, early)
    done, sizes = beside() if beside else None, counts.tolist()
    with part("dispatch"):
        chunks = gather_chunks(features, order, sizes, index.shape[1], padded_sizes(sizes, features.device))
    outputs = _run(experts, chunks, sizes, observe)
    with part("dispatch"):
        return Routed(scatter_chunks(outputs, order, sizes, index.shape[1], weight), counts, done)


def _over_ranks(
    features: Tensor,
    order: Tensor,
    counts: Tensor,
    k: int,
    weight: Tensor | None,
    experts: Sequence[nn.Module],
    group: Any,
    observe: Callable[[int, Tensor], None] | None,
    beside: Callable[[], Tensor] | None,
    early: int | None,
) -> Routed:
    """:func:`route_through` where experts are spread over ranks; ``order``: the (T k,) choices sorted by expert."""
    local, rank, device = len(experts), dist.get_rank(group), features.device
    leaving = counts.view(-1, local)
    expected = CountExchange(leaving, group)
    if torch.is_grad_enabled() and not features.requires_grad:
        # Nothing below trains. Ranks whose experts are all frozen would build no graph, and the others' backward
        # pass would wait for them.
        features = features.detach().requires_grad_()
    staying = list[int]()
    if early is not None:
        staying = leaving[rank].tolist()
        before, stay, after = order.split([int(leaving[:rank].sum()), sum(staying), int(leaving[rank + 1 :].sum())])
        order, leaving = torch.cat([before, after, stay]), leaving.clone()
        leaving[rank] = 0
    early, away = early or 0, len(order) - sum(staying)
    with part("dispatch"):
        rows, *stay = gather_chunks(features, order, [away, *staying], k, [away, *padded_sizes(staying, device)])
    arriving = expected.wait()
    if staying:
        arriving[rank] = 0
    send, receive = torch.stack([leaving.sum(1), arriving.sum(1)]).tolist()
    there, back = RowExchange(send, receive, group), RowExchange(receive, send, group)
    coming = there.start(rows)
    done = beside() if beside else None
    made = _run(experts[:early], stay[:early], staying[:early], observe)
    arrived = there.wait(coming)
    with part("dispatch"):
        # Rows arrive by source rank, then expert; experts want them by expert, then source rank.
        chunk = torch.arange(counts.numel(), device=device).repeat_interleave(arriving.reshape(-1))
        by_expert = torch.argsort((chunk % local) * len(arriving) + chunk // local, stable=True)
        sizes = arriving.sum(0).tolist()
        chunks = gather_chunks(arrived, by_expert, sizes, 1, padded_sizes(sizes, device))
    processed = _run(experts, chunks, sizes, observe)
    with part("dispatch"):
        processed_rows = scatter_chunks(processed, by_expert, sizes, 1, None)
    coming = back.start(processed_rows)
    made += _run(experts[early:], stay[early:], staying[early:], observe, early)
    returned = back.wait(coming)
    # In pieces only where weights need room in fp32.
    sizes = [away] if weight is None else leaving.flatten().tolist()
    with part("dispatch"):
        outputs = scatter_chunks([*returned.split(sizes), *made], order, [*sizes, *staying], k, weight)
    return Routed(outputs, counts, done)


def _run(
    experts: Sequence[nn.Module],
    chunks: Sequence[Tensor],
    sizes: list[int],
    observe: Callable[[int, Tensor], None] | None,
    first: int = 0,
) -> list[Tensor]:
    """Apply each expert to its rows, as long as there are chunks; ``first``: number of the first expert.

    An expert without rows still runs on padding, so that it stays in the graph and no rank waits.
    """
    outputs = list[Tensor]()
    for number, (chunk, size) in enumerate(zip(chunks, sizes, strict=True)):
        if observe is not None:
            observe(first + number, chunk[:size])
        output = experts[number](chunk)
        outputs.append(output[0] if isinstance(output, tuple) else output)
    return outputs
