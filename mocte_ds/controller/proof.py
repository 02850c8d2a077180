"""Proves that frozen weights stand still and live ones move, after every change and at checks, and are the same where
several ranks have them.
"""

from collections import defaultdict

import torch
from torch import Tensor

from mocte_ds.controller.run_state import RunState
from mocte_ds.dist.collectives import gather_objects
from mocte_ds.errors import MocteError
from mocte_ds.zero import held

PROOF_STEPS = 2
# Elements that are looked at together: the checksum of a large expert must not take several times its memory.
_CHUNK = 1 << 22


class Proof:
    """Compares checksums of this rank's units between two moments; every method that may raise is collective."""

    def __init__(self) -> None:
        """Nothing is frozen yet."""
        self._frozen: dict[str, Tensor] = {}
        self._live: dict[str, Tensor] = {}
        self._had_gradient: set[str] = set()
        self._squares: dict[str, list[float]] = {}
        self._left = 0

    def remember_frozen(self, run: RunState) -> None:
        """Take checksums of this rank's frozen units."""
        frozen = run.frozen_units()
        self._frozen = {
            name: checksum(held(unit.parameters)) for name, unit in run.registry.units.items() if name in frozen
        }

    def begin(self, run: RunState) -> None:
        """Watch the next steps; called right after a change of the partition, before the next step."""
        self.remember_frozen(run)
        self._live = {name: checksum(masters) for name, masters in run.optimizer.masters().items()}
        # Experts may go without tokens; anything else that had a gradient before the change has one after it.
        experts = {f"{handle.name}.{k}" for handle in run.blocks for k in range(len(handle.experts))}
        had = _somewhere({name for name, square in run.optimizer.unit_square_norms.items() if square > 0}, run)
        self._had_gradient = (had - experts) & set(self._live)
        self._squares, self._left = defaultdict(list), PROOF_STEPS

    def after_step(self, run: RunState) -> None:
        """Look at the step that was just done.

        Raises:
            MocteError: on all ranks; names the unit, what happened and on which rank.
        """
        if not self._left or run.optimizer.overflow:  # a skipped step of fp16 proves nothing
            return
        self._left -= 1
        problem = self._moved(run)
        for name, square in run.optimizer.unit_square_norms.items():
            self._squares[name].append(square if run.optimizer.step_rates[name] > 0 else 0.0)
        if not self._left:
            problem = self._stuck(run) or problem
        _raise_together(problem, run)

    def require_frozen_unmoved(self, run: RunState) -> None:
        """Compare the frozen units with the last checksums, and what tensor ranks share with each other's.

        Raises:
            MocteError: see :meth:`after_step`.
        """
        apart = _apart(run)
        _raise_together(self._moved(run) or apart, run)

    def _moved(self, run: RunState) -> str | None:
        for name, before in self._frozen.items():
            now = checksum(held(run.registry.units[name].parameters))
            if not torch.equal(now, before):
                return (
                    f"the frozen unit {name} moved (checksum {before.tolist()}, then {now.tolist()}): something writes "
                    "to parameters outside of the optimizer"
                )
        return None

    def _stuck(self, run: RunState) -> str | None:
        own = {name for name, squares in self._squares.items() if any(squares)}
        found = _somewhere(own, run)  # a rank's part of a table may have no gradient for long
        for name, masters in run.optimizer.masters().items():
            before = self._live.pop(name, None)
            if name not in found:
                if name in self._had_gradient and run.optimizer.step_rates[name] > 0:
                    return f"{name} trains, had a gradient before the last change of the partition and has none now"
            elif name in own and before is not None and torch.equal(checksum(masters), before):
                return f"{name} trains and had a gradient, but {PROOF_STEPS} steps have not moved it"
        self._live = {}
        return None


@torch.no_grad()
def checksum(tensors: list[Tensor]) -> Tensor:
    """Checksum of the exact bits of some tensors, (2,) int64: the sum of their words, and the sum weighted by place."""
    total = torch.zeros(2, dtype=torch.int64)
    for tensor in tensors:
        words = tensor.detach().reshape(-1).contiguous()
        words = words.view(torch.int16 if words.element_size() == 2 else torch.int32)
        for start in range(0, words.numel(), _CHUNK):
            chunk = words[start : start + _CHUNK].to(torch.int64)
            place = torch.arange(start, start + chunk.numel(), device=chunk.device) % 65521 + 1
            total += torch.stack([chunk.sum(), (chunk * place).sum()]).cpu()
    return total


def _apart(run: RunState) -> str | None:
    """What differs between the ranks of a tensor group although all of them have all of it (collective)."""
    axis = run.mesh.tensor
    if axis.size == 1:
        return None
    sums = {f"the weights of {unit}": checksum(masters).tolist() for unit, masters in run.optimizer.uncut().items()}
    for handle in run.blocks:
        for number, bank in enumerate(handle.block.banks):
            gate = [value for value in bank.gate.state_dict().values() if value.element_size() > 1]
            sums[f"gate {number} of {handle.name}"] = checksum(gate).tolist()
    everywhere = gather_objects(sums, axis)
    names = [name for name in sums if any(part.get(name) != sums[name] for part in everywhere)]
    return f"{names[0]} differ between the ranks of a tensor group" if names else None


def _somewhere(names: set[str], run: RunState) -> set[str]:
    """The names that some rank has (collective)."""
    return {name for part in gather_objects(sorted(names), run.mesh.world) for name in part}


def _raise_together(problem: str | None, run: RunState) -> None:
    found = [(rank, text) for rank, text in enumerate(gather_objects(problem, run.mesh.world)) if text]
    if found:
        rank, text = found[0]
        raise MocteError(
            f"after step {run.step}, on rank {rank}: {text}. The run stops because its results would be wrong; start "
            "again from the last checkpoint."
        )
