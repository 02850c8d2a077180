"""Micro-batches of which the probe set is made: which tokens are to be predicted, and which batches can be joined."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Call = tuple[Sequence[Any], dict[str, Any]]
"""Arguments of a model's call, by place and by name."""
_IGNORED = -100


def labelled(ids: Tensor, labels: Tensor | None) -> Tensor:
    """(B, T) bool: False for a token that is not to be predicted, because its label is -100.

    Labels stand at their own token, as transformers has it, or at the one before, as launch/pretrain.py's decoders have
    it: what they agree with says which. Labels that are no next tokens say nothing.
    """
    every = torch.ones(ids.shape, dtype=torch.bool)
    if labels is None or labels.shape != ids.shape or not bool((labels == _IGNORED).any()):
        return every
    told = labels != _IGNORED
    if torch.equal(labels[told], ids[told]):
        return told
    if torch.equal(labels[:, :-1][told[:, :-1]], ids[:, 1:][told[:, :-1]]):
        return torch.cat([every[:, :1], told[:, :-1]], dim=1)
    return every


def alike(first: Call, part: Call) -> bool:
    """Whether two micro-batches can be made one: the same arguments, of the same length."""
    one, other = ids_of(first), ids_of(part)
    if one.shape[1:] != other.shape[1:] or len(first[0]) != len(part[0]) or set(first[1]) != set(part[1]):
        return False
    pairs = [*zip(first[0], part[0], strict=True), *[(value, part[1][name]) for name, value in first[1].items()]]
    return all(_fit(mine, yours, len(one), len(other)) for mine, yours in pairs)


def _fit(mine: Any, yours: Any, rows: int, other_rows: int) -> bool:
    if not isinstance(mine, Tensor) or not isinstance(yours, Tensor):
        return not isinstance(mine, Tensor) and not isinstance(yours, Tensor)
    if mine.dim() and yours.dim() and len(mine) == rows and len(yours) == other_rows:
        return mine.shape[1:] == yours.shape[1:]
    return mine.shape == yours.shape and torch.equal(mine, yours)


def joined(parts: list[Call]) -> Call:
    """One micro-batch of several that are :func:`alike`; what is not a row a sequence stays as it is."""
    rows = [len(ids_of(part)) for part in parts]
    args = [_joined([part[0][i] for part in parts], rows) for i in range(len(parts[0][0]))]
    return args, {name: _joined([part[1][name] for part in parts], rows) for name in parts[0][1]}


def ids_of(part: Call) -> Tensor:
    """(B, T) token ids of a call."""
    return part[1].get("input_ids", part[0][0] if part[0] else None)


def _joined(values: list[Any], rows: list[int]) -> Any:
    by_row = all(isinstance(v, Tensor) and v.dim() and len(v) == n for v, n in zip(values, rows, strict=True))
    return torch.cat(values) if by_row else values[0]
