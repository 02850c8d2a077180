"""How many tokens the experts of a bank have got: in all, in this optimizer step, and their shares of the last one."""

import torch
from torch import Tensor


class Loads:
    """Of one bank on this rank; on the CPU also where a model is made on the meta device."""

    def __init__(self, experts: int) -> None:
        """Nothing is counted yet, and the shares are even."""
        self.total = torch.zeros(experts, dtype=torch.int64, device="cpu")
        """(E,) tokens of each expert since its birth; kept on one rank when a run resumes, so that sums stay right."""
        self.step = torch.zeros(experts, dtype=torch.int64, device="cpu")
        """(E,) of these, what the optimizer step that goes on has added."""
        self.weight = torch.zeros(1, dtype=torch.float64, device="cpu")
        """(1,) sum of the weights that the tokens of this step had; for `unit_mean`."""
        self.sums: Tensor | None = None
        """(E, r) fp64 sums of what a key that moves has read of this step's tokens; None: nothing yet."""
        self.share = torch.full((experts,), 1.0 / experts, device="cpu")
        """(E,) share of the tokens that each expert got in the last optimizer step, all ranks together."""

    def add(self, counts: Tensor, weight: Tensor | None, sums: Tensor | None = None) -> None:
        """Take what a complete pass has counted.

        Args:
            counts: (E,) tokens of each expert.
            weight: () sum of their weights; None: nobody asks.
            sums: (E, r) of what the key has read of them; None: it does not move.
        """
        self.total += counts.to(self.total.device)
        self.step += counts.to(self.step.device)
        if weight is not None:
            self.weight += weight.to(self.weight.device)
        if sums is not None:
            self.sums = sums.cpu() if self.sums is None else self.sums + sums.cpu()

    def end_step(self, load: Tensor) -> None:
        """Begin the next optimizer step.

        Args:
            load: (E,) int64 tokens of each expert in the one that is over, all ranks together.
        """
        if int(load.sum()):
            self.share = (load.double() / load.sum()).float()
        self.forget_step()

    def take_back_step(self) -> None:
        """Start counting the current step again, and take what was counted of it out of the total."""
        self.total -= self.step
        self.forget_step()

    def forget_step(self) -> None:
        """Start counting the current step again."""
        self.step.zero_()
        self.weight.zero_()
        self.sums = None
