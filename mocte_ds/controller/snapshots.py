"""Weights of experts as they were at the last check."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mocte_ds.zero import exchanged, held


class Snapshots:
    """This rank's experts as of the last check, to measure what they have learned since."""

    def __init__(self) -> None:
        self._weights: dict[str, list[Tensor]] = {}

    def __contains__(self, unit: str) -> bool:
        return unit in self._weights

    @torch.no_grad()
    def take(self, units: Mapping[str, tuple[nn.Parameter, ...]]) -> None:
        """Remember the weights of some units and forget all others."""
        for name in set(self._weights) - set(units):
            del self._weights[name]
        for name, old in self._weights.items():
            for kept, now in zip(old, held(units[name]), strict=True):
                kept.copy_(now)
        self.add(units)

    @torch.no_grad()
    def add(self, units: Mapping[str, tuple[nn.Parameter, ...]]) -> None:
        """Remember the weights of the units that are not known yet, in addition."""
        for name, parameters in units.items():
            if name not in self._weights:
                self._weights[name] = [now.clone() for now in held(parameters)]

    @contextmanager
    def in_place(self, units: Mapping[str, tuple[nn.Parameter, ...]]) -> Iterator[None]:
        """Context manager: the units have their old weights in it, and the very same tensors as before after it."""
        names = [name for name in self._weights if name in units]
        parameters = [parameter for name in names for parameter in units[name]]
        with exchanged(parameters, [old for name in names for old in self._weights[name]]):
            yield

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Weights by unit."""
        return {name: [tensor.cpu() for tensor in tensors] for name, tensors in self._weights.items()}

    def load_state_dict(self, state: Mapping[str, list[Tensor]], device: torch.device) -> None:
        """Take over what :meth:`state_dict` returned."""
        self._weights = {name: [tensor.to(device) for tensor in tensors] for name, tensors in state.items()}
