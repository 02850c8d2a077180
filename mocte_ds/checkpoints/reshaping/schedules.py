"""The state of a learning-rate scheduler for a rank with other parameter groups than the one that wrote it."""

from collections.abc import Sequence
from typing import Any

from mocte_ds.checkpoints.reshaping.shards import Key


def for_groups(state: Any, before: Sequence[Key], now: Sequence[Key]) -> Any:
    """Rearrange every list with one number a group.

    Args:
        state: of any scheduler of torch or DeepSpeed, nested ones included.
        before: groups of the rank that wrote it.
        now: groups of this rank; one that is new follows a group with the same options, else the first, as in a run.
    """
    if before == now or not before:
        return state
    options = [key[1] for key in before]
    sources = [before.index(key) if key in before else options.index(key[1]) if key[1] in options else 0 for key in now]
    return _rearranged(state, len(before), sources)


def _rearranged(state: Any, count: int, sources: list[int]) -> Any:
    if isinstance(state, dict):
        return {name: _rearranged(value, count, sources) for name, value in state.items()}
    if isinstance(state, list):
        if len(state) == count and all(item is None or isinstance(item, int | float) for item in state):
            return [state[source] for source in sources]
        return [_rearranged(item, count, sources) for item in state]
    return state
