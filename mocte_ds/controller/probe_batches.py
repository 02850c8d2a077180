"""Micro-batches of which the probe set is made: which tokens are to be predicted, and which batches can be joined."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = tuple[Sequence[Any], dict[str, Any]]
"""Arguments of a model's call, by place and by name."""
_IGNORED = -100


def labelled(ids: Tensor, labels: Tensor | None) -> Tensor:
    """(B, T) bool: False for a token that is not to be predicted, because its label is -100.

    Labels stand at their own token, as in transformers, or at the one before, as in launch/pretrain.py's decoders; the
    ids that they agree with tell which. Labels that are not next tokens are ignored.
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


@dataclass
class Rows:
    """Sequences of one call of the model, on the CPU, and what is known of them."""

    call: Call
    domain: Tensor
    """(n,) source of each sequence, -1 where unknown."""
    number: Tensor
    """(n,) number of each sequence in the global batch, later in the set."""
    labelled: Tensor
    """(n, T) bool, see :func:`labelled`."""
    length: Tensor
    """(n,) tokens of each sequence, before it was filled up."""

    def cut(self, keep: Tensor) -> "Rows":
        """Some of the sequences: where ``keep`` (n,) is True."""
        count = len(self.number)

        def of(value: Any) -> Any:
            fits = isinstance(value, Tensor) and value.dim() > 0 and len(value) == count
            return value.detach()[keep.to(value.device)].cpu() if fits else value

        args, kwargs = self.call
        call = ([of(value) for value in args], {name: of(value) for name, value in kwargs.items()})
        return Rows(call, self.domain[keep], self.number[keep], self.labelled[keep], self.length[keep])


def spread(count: int) -> Tensor:
    """(count,) int64 place of each number in an order of which every prefix is spread evenly over all numbers.

    Numbers are ordered by their binary digits from the last to the first (van der Corput, 1935).
    """
    digits = max(1, (count - 1).bit_length())
    backwards = sum(((torch.arange(count) >> digit) & 1) << (digits - 1 - digit) for digit in range(digits))
    return torch.as_tensor(backwards).argsort().argsort()


def together(parts: list[Rows]) -> Rows:
    """Several calls as one, as long as the longest; those that do not fit the first are left out."""
    longest = max(ids_of(part.call).shape[1] for part in parts)
    filled = [part for part in (_filled(part, longest) for part in parts) if part is not None] or parts[:1]
    same = [part for part in filled if _alike(filled[0].call, part.call)]
    return Rows(
        joined([part.call for part in same]),
        torch.cat([part.domain for part in same]),
        torch.cat([part.number for part in same]),
        torch.cat([part.labelled for part in same]),
        torch.cat([part.length for part in same]),
    )


def _filled(part: Rows, longest: int) -> Rows | None:
    """A call with zeros after its sequences (labels: -100); None if an argument cannot be filled up."""
    rows, length = ids_of(part.call).shape
    if length == longest:
        return part

    def fill(value: Any, filler: int = 0) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != (rows, length):
            return value
        more = value.new_full((rows, longest - length, *value.shape[2:]), filler)
        return torch.cat([value, more], dim=1)

    args, kwargs = part.call
    whole = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if any(value.dim() > 1 and value.shape[:2] != (rows, length) and length in value.shape for value in whole):
        return None  # a mask of queries and keys, for example
    call = (
        [fill(value) for value in args],
        {name: fill(value, _IGNORED if name == "labels" else 0) for name, value in kwargs.items()},
    )
    return Rows(call, part.domain, part.number, fill(part.labelled), part.length)


def _alike(first: Call, part: Call) -> bool:
    """Whether two calls can be joined: the same arguments, of the same length."""
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
    """Several micro-batches that are :func:`alike` as one; arguments without a row per sequence stay as they are."""
    rows = [len(ids_of(part)) for part in parts]
    args = [_joined([part[0][i] for part in parts], rows) for i in range(len(parts[0][0]))]
    return args, {name: _joined([part[1][name] for part in parts], rows) for name in parts[0][1]}


def ids_of(part: Call) -> Tensor:
    """(B, T) token ids of a call."""
    return part[1].get("input_ids", part[0][0] if part[0] else None)


def _joined(values: list[Any], rows: list[int]) -> Any:
    by_row = all(isinstance(v, Tensor) and v.dim() and len(v) == n for v, n in zip(values, rows, strict=True))
    return torch.cat(values) if by_row else values[0]
