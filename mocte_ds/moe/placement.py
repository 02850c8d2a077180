"""Which experts share a rank: a rank holds consecutive ones, so their numbers decide, and are given out by load."""

import torch
from torch import Tensor

# Shapes: B banks of a block, E experts of a bank.


def even_placement(loads: Tensor) -> Tensor:
    """Order of the experts in which ranks that hold consecutive ones have nearly equal loads, however many ranks.

    The experts of each bank are split into parts of equal number, as many as the smallest prime factor of E, and each
    part again. The heaviest expert goes first, to the part with the least load so far in all banks together (Graham,
    1969, with a bound on the number). Numbers of ranks whose prime factors come in another order get less even loads.

    Args:
        loads: (B, E) tokens of each expert.

    Returns:
        (B, E) int64: which expert stands at each place.
    """
    count = loads.shape[1]
    return torch.tensor(_split(loads.tolist(), [list(range(count)) for _ in loads]), dtype=torch.int64)


def _split(loads: list[list[int]], banks: list[list[int]]) -> list[list[int]]:
    """The experts of each bank in their new order."""
    count = len(banks[0])
    if count == 1:
        return banks
    parts = next(p for p in range(2, count + 1) if count % p == 0)
    taken: list[list[list[int]]] = [[[] for _ in banks] for _ in range(parts)]
    total = [0] * parts
    heaviest_first = sorted(range(len(banks)), key=lambda bank: -max(loads[bank][expert] for expert in banks[bank]))
    for bank in heaviest_first:
        for expert in sorted(banks[bank], key=lambda expert: -loads[bank][expert]):
            open_parts = [part for part in range(parts) if len(taken[part][bank]) < count // parts]
            least = min(open_parts, key=lambda part: total[part])
            taken[least][bank].append(expert)
            total[least] += loads[bank][expert]
    ordered = [_split(loads, part) for part in taken]
    return [[expert for part in ordered for expert in part[bank]] for bank in range(len(banks))]
