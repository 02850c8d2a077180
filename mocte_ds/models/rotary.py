"""Frequencies of rotary positions, as they are and stretched for longer contexts."""

import math
from typing import Any

import torch
from torch import Tensor

from mocte_ds.errors import ConfigError
from mocte_ds.shown import shown

_LLAMA3 = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
_LARGEST = 2.0**63
_NEEDED = {"linear": ("factor",), "llama3": ("factor", *_LLAMA3)}


def require_known_scaling(scaling: dict[str, Any] | None) -> None:
    """Refuse stretched positions that :func:`frequencies` does not know.

    Raises:
        ConfigError: another type, or a number that is missing, too much or not positive.
    """
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise ConfigError(f"rope_scaling.rope_type = {shown(kind)} is not one of {list(_NEEDED)}.")
    numbers = {key: value for key, value in scaling.items() if key != "rope_type"}
    if set(numbers) != set(_NEEDED[kind]) or not all(_is_positive(value) for value in numbers.values()):
        raise ConfigError(
            f"rope_scaling of type '{kind}' = {shown(numbers)} needs positive {', '.join(_NEEDED[kind])}."
        )
    if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise ConfigError("rope_scaling.low_freq_factor must be smaller than high_freq_factor.")


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= _LARGEST


def frequencies(size: int, theta: float, scaling: dict[str, Any] | None, device: torch.device | None = None) -> Tensor:
    """Angle of each pair of features at position 1 (Su et al., RoFormer, 2021).

    `linear` divides all of them by the factor (Chen et al., Position Interpolation, 2023). `llama3` divides those that
    turn less than low_freq_factor times within the original context, keeps those that turn more than high_freq_factor
    times, and goes from one to the other in between (Llama 3.1).

    Args:
        size: features that are turned, even.
        theta: base.
        scaling: as `model.rope_scaling`.
        device: of the result.

    Returns:
        (size / 2,) fp32, rounded as in transformers.
    """
    frequency = 1.0 / theta ** (torch.arange(0, size, 2, device=device).float() / size)
    if scaling is None:
        return frequency
    slow = frequency / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    context, low, high = (scaling[key] for key in _LLAMA3)
    length = 2 * math.pi / frequency
    share = (context / length - low) / (high - low)
    between = (1 - share) * slow + share * frequency
    mixed = torch.where(length > context / low, slow, between)
    return torch.where(length < context / high, frequency, mixed)
