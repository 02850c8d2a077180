"""Steps whose loss or gradient is not finite: skipped as if their batch had never been read, so many in a row."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mocte_ds.checkpoints.random_states import Draws
from mocte_ds.dist.collectives import gather_objects
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import ConfigError, NonFiniteLoss

EVENT = "skipped_step"
Facts = dict[str, Any]


class Skips:
    """What one engine skips. DeepSpeed's optimizer finds the gradient out and drops it, on all ranks alike.

    It also counts the step. Here the count is taken back, and the next batch is trained on in its place: at the same
    step of the schedule, with the random numbers that the passes of the skipped one have drawn.
    """

    def __init__(
        self,
        limit: int,
        axis: Axis,
        tell: Callable[[Facts], None],
        where: Callable[[], Facts] = dict,
        give_up: Callable[[list[Facts]], None] | None = None,
    ) -> None:
        """Nothing is skipped yet.

        Args:
            limit: steps in a row; 0: none, DeepSpeed and the caller do what they do without this.
            axis: all ranks.
            tell: called with the event of every skipped step, on all ranks.
            where: more facts about the step that is skipped, the same on all ranks.
            give_up: called with the events of all steps in a row, and of the one that is one too many; None: raises
                NonFiniteLoss.
        """
        self.limit, self.streak = limit, list[Facts]()
        """Events of the steps that were skipped since the last one that was not; part of a checkpoint."""
        self._axis, self._tell, self._where, self._give_up = axis, tell, where, give_up or _give_up
        self.spoiled: Tensor | float = 0.0
        """NaN where a loss of this rank in this step is not finite, else 0."""
        self._begun = False
        """Whether this step has had a pass."""
        self._draws = Draws()
        self._sources: list[tuple[Tensor, list[str]]] = []

    def restore(self, streak: list[Facts]) -> None:
        """Go on from a checkpoint: with its streak, and without what a step that was going on has left.

        Args:
            streak: of the checkpoint, see :attr:`streak`.
        """
        self.streak = streak
        self._end_step()

    def _end_step(self) -> None:
        self.spoiled, self._begun, self._draws, self._sources = 0.0, False, Draws(), []

    def begin_pass(self, domain: Tensor | None, names: list[str]) -> bool:
        """Before a forward pass that trains: remember what it reads.

        Args:
            domain: (B,) source of each sequence, an index into ``names``, or None.
            names: of the sources.

        Returns:
            Whether it is the first of its step, and steps may be skipped.
        """
        if not self.limit:
            return False
        if domain is not None:
            self._sources.append((domain, names))
        first, self._begun = not self._begun, True
        return first

    def drawing(self) -> contextlib.AbstractContextManager[None]:
        """Context manager for a forward or backward pass: what it draws is undone where its step is skipped."""
        return self._draws.within() if self.limit else contextlib.nullcontext()

    def see(self, loss: Any) -> None:
        """Look at what a backward pass begins with; nobody waits for the device.

        Args:
            loss: as the caller computed it; what is not a number by type is passed over.
        """
        if self.limit and isinstance(loss, Tensor) and loss.numel() == 1:
            # In its own precision: what is finite there may be infinite in fp32.
            self.spoiled = self.spoiled + (loss.detach().reshape(()) * 0.0).float()

    def look(self, engine: Any) -> bool:
        """After an optimizer step: whether it was skipped; then the engine stands before it again (collective).

        Args:
            engine: DeepSpeed's, whose `optimizer.overflow` says it, the same on all ranks.

        Raises:
            NonFiniteLoss: on all ranks, where nobody else gives up: too many in a row.
        """
        spoiled, draws, sources = self.spoiled, self._draws, self._sources
        self._end_step()
        if not (self.limit and engine.optimizer.overflow):
            self.streak = []
            return False
        engine.global_steps -= 1
        engine.global_samples -= engine.train_batch_size()
        draws.undo()
        self.streak = [*self.streak, self._facts(engine.global_steps + 1, float(spoiled), sources)]
        if len(self.streak) > self.limit:
            self._give_up(self.streak)
        self._tell(self.streak[-1])
        return True

    def _facts(self, step: int, spoiled: float, sources: list[tuple[Tensor, list[str]]]) -> Facts:
        """The event of a step (collective)."""
        own = sorted({names[i] for domain, names in sources for i in domain.flatten().tolist() if 0 <= i < len(names)})
        told = gather_objects((spoiled == spoiled, own), self._axis)
        bad = [rank for rank, (finite, _) in enumerate(told) if not finite]
        chosen = [told[rank][1] for rank in bad] if bad else [names for _, names in told]
        facts = {
            "event": EVENT,
            "step": step,
            "what": "loss" if bad else "gradient norm",
            "ranks": bad,
            "domains": sorted(set().union(*chosen)),
            "in_a_row": len(self.streak) + 1,
            **self._where(),
        }
        number = f"{facts['in_a_row']} in a row, of at most {self.limit}"
        return {**facts, "reason": f"{described(facts)} was not finite; {number}"}


def described(facts: Mapping[str, Any]) -> str:
    """What was not finite in a step, and where: `the loss on rank 1 (letters; sequences 8 to 15)`."""
    text = f"the {facts['what']}"
    if facts["ranks"]:
        text += f" on rank{'s' if len(facts['ranks']) > 1 else ''} {', '.join(map(str, facts['ranks']))}"
    parts = [", ".join(facts["domains"])] if facts["domains"] else []
    if "sequences" in facts:
        parts.append("sequences {} to {}".format(*facts["sequences"]))
    return text + (f" ({'; '.join(parts)})" if parts else "")


def warn(facts: Mapping[str, Any], rank: int) -> None:
    """Tell of a skipped step in the log of the process, on rank 0."""
    if rank == 0:
        logging.getLogger("mocte_ds").warning(f"step {facts['step']} was skipped: {facts['reason']}.")


def require_skippable(settings: Mapping[str, Any], key: str, limit: int) -> None:
    """Refuse what steps cannot be skipped with.

    Args:
        settings: a DeepSpeed config, from :func:`mocte_ds.deepspeed_settings.checked_settings`.
        key: that asks for it.
        limit: its value; 0: it does not.

    Raises:
        ConfigError: names what DeepSpeed's optimizer would do.
    """
    zero, bf16 = settings.get("zero_optimization") or {}, settings.get("bf16") or {}
    autocast = settings.get("torch_autocast") or {}
    problem = None
    if (settings.get("fp16") or {}).get("enabled"):
        problem = "fp16.enabled = true: its loss scale grows until a step overflows and is skipped"
    elif autocast.get("enabled") and str(autocast.get("dtype")).removeprefix("torch.") in ("fp16", "float16", "half"):
        problem = "torch_autocast.dtype = fp16: its loss scale grows until a step overflows and is skipped"
    elif not zero.get("stage"):
        problem = "zero_optimization.stage = 0: there DeepSpeed applies gradients that are not finite; use 1, 2 or 3"
    elif not zero.get("compute_grad_norm", True):
        problem = "zero_optimization.compute_grad_norm = false: nobody looks at the gradients; remove it"
    elif bf16.get("enabled") and not bf16.get("check_grad_overflow", True):
        problem = "bf16.check_grad_overflow = false: nobody looks at the gradients; remove it"
    if limit and problem:
        raise ConfigError(f"{key} = {limit} does not go with {problem}. With {key} = 0 no step is skipped.")


def _give_up(streak: list[Facts]) -> None:
    steps = f"after {len(streak) - 1} in a row were skipped (mocte.skip_nonfinite)"
    raise NonFiniteLoss(
        f"step {streak[-1]['step']}: {described(streak[-1])} is not finite, {steps}. No weight has changed since the "
        "last step that was. Load the last good checkpoint and leave these batches out, or lower the learning rate."
    )
