"""Finds, inside of a backward pass, the forward pass whose part is being recomputed.

Every autograd node can carry notes of its own (`metadata`, which PyTorch's anomaly mode uses too). In the forward pass
the nodes that make a block's features and its output are tagged with the pass's state, and so is the tensor that each
module around a block reads. Activation checkpointing recomputes while the backward pass stands at some node of the
original graph: a node of the checkpointed part, or, reentrant, the one node that stands for all of it. From there the
way through the graph meets a tag of the same pass first. Notes live exactly as long as the graph.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.errors import MocteError
from mocte_ds.moe.forward import ForwardState

_MADE, _READ = "mocte_ds.made", "mocte_ds.read"


def backward_task() -> int:
    """Number of the backward pass that this thread is inside of; -1: none."""
    return int(torch._C._current_graph_task_id())


def tag_made(tensor: Any, state: ForwardState) -> None:
    """Note, on the node that made a tensor (or each tensor of a nested output), which pass it belongs to."""
    if isinstance(tensor, dict):
        tensor = list(tensor.values())
    if isinstance(tensor, list | tuple):
        for part in tensor:
            tag_made(part, state)
        return
    if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
        tensor.grad_fn.metadata[_MADE] = state


def tag_read(tensor: Tensor, state: ForwardState) -> None:
    """Note, on the node before a tensor, that a pass reads it; several passes may read one tensor."""
    if not tensor.requires_grad or isinstance(tensor, nn.Parameter):
        return
    node = torch.autograd.graph.get_gradient_edge(tensor).node
    readers = node.metadata.setdefault(_READ, [])
    if not any(reader is state for reader in readers):
        readers.append(state)


def recomputed_state(where: str = "") -> ForwardState | None:
    """The forward pass that the backward pass is in; None if there is no tag on the way.

    Args:
        where: for the error: what is being recomputed.

    Raises:
        MocteError: two passes have read the same tensor, and nothing tells which of them this is.
    """
    node = torch._C._current_autograd_node()
    if node is None:
        return None
    if _MADE in node.metadata:
        return node.metadata[_MADE]
    # Who reads what this node made may be another pass, so this note comes last.
    last = node.metadata.get(_READ, [])
    known, queue, most = {node}, deque(_inputs(node)), len(last)
    while queue:
        node = queue.popleft()
        if node in known:
            continue
        known.add(node)
        readers = node.metadata.get(_READ, [])
        if len(readers) == 1:
            return readers[0]
        if readers:  # what lies beyond belongs to none of them
            most = max(most, len(readers))
            continue
        if _MADE in node.metadata:
            return node.metadata[_MADE]
        queue.extend(_inputs(node))
    if most > 1:
        raise MocteError(
            f"{most} forward passes have read the same tensor, and the recomputation of {where or 'a block'} cannot "
            "tell which of them it belongs to. Give each pass a tensor of its own (x.clone()), or checkpoint with "
            "use_reentrant=False."
        )
    return last[0] if last else None


def _inputs(node: Any) -> list[Any]:
    return [following for following, _ in node.next_functions if following is not None]
