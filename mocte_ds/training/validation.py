"""Loss on held-out sequences, by domain."""

from typing import Any

import torch
from torch import Tensor

from mocte_ds.dist.collectives import sum_over_ranks
from mocte_ds.dist.mesh import Axis
from mocte_ds.training.model import Forward, logits_of


class Validation:
    """Fixed validation sequences, shared out over the ranks so that every rank makes the same number of forwards."""

    def __init__(
        self, batches: dict[str, tuple[Tensor, Tensor]], micro_batch: int, forward: Forward, axis: Axis
    ) -> None:
        """Take the sequences.

        Args:
            batches: by domain: input_ids and labels (n, T).
            micro_batch: sequences of a forward.
            forward: how the model is called.
            axis: the ranks that share them out.
        """
        self._forward, self._axis = forward, axis
        self.domains = sorted(batches)
        inputs = torch.cat([batches[d][0] for d in self.domains])
        labels = torch.cat([batches[d][1] for d in self.domains])
        owner = torch.cat([torch.full((len(batches[d][0]),), i) for i, d in enumerate(self.domains)])
        mine = torch.arange(len(inputs))[axis.rank :: axis.size]
        turns = -(-len(inputs) // (axis.size * micro_batch))
        # Experts are spread over the ranks: one rank without a forward would leave the others waiting.
        padded = torch.cat([mine, mine.new_zeros(turns * micro_batch - len(mine))])
        self._valid = (torch.arange(len(padded)) < len(mine)).split(micro_batch)
        self._parts = [(inputs[i], labels[i], owner[i]) for i in padded.split(micro_batch)]
        self.tokens = inputs.numel()

    @torch.no_grad()
    def losses(self, engine: Any) -> dict[str, float]:
        """Mean loss in nats per token of each domain, and their mean (collective)."""
        training = engine.module.training
        engine.eval()
        sums = torch.zeros(2, len(self.domains), dtype=torch.float64)
        for (inputs, labels, owner), valid in zip(self._parts, self._valid, strict=True):
            logits = logits_of(engine(**self._forward.inputs(inputs.to(engine.device)))).float()
            flat = labels.flatten().to(logits.device)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), flat, ignore_index=-100, reduction="none")
            by_row = loss.view(labels.shape).double().sum(1).cpu() * valid
            count = (labels != -100).sum(1) * valid
            sums[0].index_add_(0, owner, by_row)
            sums[1].index_add_(0, owner, count.double())
        engine.train(training)
        sums = sum_over_ranks(sums, self._axis)
        mean = (sums[0] / sums[1]).tolist()
        return {**dict(zip(self.domains, mean, strict=True)), "mean": sum(mean) / len(mean)}


def probe_rows(held_out: dict[str, Tensor], domains: list[str]) -> tuple[Tensor, Tensor] | None:
    """Sequences for the probe set of checks, all domains in turn; None where there is too little text.

    Args:
        held_out: (n, T) ids by domain; none that validation scores, since experts are chosen by them.
        domains: of the run, in its order.

    Returns:
        (S, T) ids, and (S,) numbers of their domains.
    """
    rows = [
        (place, domains.index(name), ids) for name, sequences in held_out.items() for place, ids in enumerate(sequences)
    ]
    if not rows:
        return None
    rows.sort(key=lambda row: row[:2])
    return torch.stack([ids for _, _, ids in rows]), torch.tensor([number for _, number, _ in rows])
