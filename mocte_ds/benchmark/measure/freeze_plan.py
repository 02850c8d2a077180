"""What freezing should save, from the sizes of a run alone: bytes of optimizer, gradients and wire, and FLOPs."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from mocte_ds.benchmark.measure.llama import llama
from mocte_ds.config import MocteConfig
from mocte_ds.flops.ledger import Ledger
from mocte_ds.training.model import TransformersModel, config_sizes, make_model

FORMULAS = {
    "optimizer": "12 bytes (fp32 weight and two moments) x trainable parameters / ranks that share them, each group of "
    "parameters padded to a multiple of 2 x these ranks, and 4 bytes (torch's AdamW counts steps) a group",
    "freed": "12 bytes x frozen parameters / ranks that share them, 4 bytes a frozen expert, and its padding",
    "gradients": "2 (bf16) or 4 (fp32) bytes x trainable parameters / ranks that share them, padded like the optimizer",
    "gradients_held": "the same for whole matrices and vectors of which the rank's part has at least one number: so "
    "DeepSpeed keeps them until the step",
    "gradients_in_backward": "2 or 4 bytes x trainable parameters of the rank, as no bucket is full before the end",
    "gradients_reduced": "payload 2 or 4 bytes x trainable parameters; DeepSpeed all-reduces them in both stages",
    "weights_gathered": "payload 2 or 4 bytes x trainable parameters, padded; nothing where one rank holds them alone",
    "rows_exchanged": "payload 4 x 2 or 4 bytes x d x tokens of all blocks with ep_size above 1, to and fro, forward "
    "and backward; on a CPU only tokens of other ranks' experts where experts have many; frozen ones take part",
    "step": "forward as without frozen experts; backward x FLOPs of the backward pass over those without frozen "
    "experts; optimizer x optimizer bytes over those without frozen experts",
}


@dataclass(frozen=True)
class FreezeSizes:
    """A small run whose experts are frozen, some more at every stop."""

    d: int
    width: int
    """Hidden units of an expert."""
    layers: int
    """All of them are blocks."""
    experts: int
    """Of a block."""
    ep: int
    stage: int
    micro_batch: int
    context: int
    dtype: str
    ranks: int
    steps: int
    """Timed, at every stop."""
    frozen: tuple[int, ...]
    """Percent of each block's experts that are frozen at each stop, ascending."""
    vocab: int = 1024

    @property
    def model(self) -> TransformersModel:
        """The model without experts."""
        return llama(self.vocab, self.d, self.width, self.layers, self.context)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of weights and gradients."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    @property
    def tokens(self) -> int:
        """Of a rank and step."""
        return self.micro_batch * self.context

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "frozen": list(self.frozen)}

    def config(self) -> dict[str, Any]:
        """The DeepSpeed config: blocks change by hand only, and a fixed table sends as many tokens to every expert."""
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": 1,
            "bf16": {"enabled": self.dtype == "bf16"},
            # No bucket is full before the end of a backward pass, whatever the sizes.
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": 10**10},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "mocte": {
                "modules": "model.layers.*.mlp",
                "num_experts": self.experts,
                "ep_size": self.ep,
                "auto": False,
                "router": {"kind": "hash"},
            },
        }

    def frozen_experts(self, percent: int) -> list[int]:
        """Which experts of each block are frozen: in turn one of every expert-parallel rank."""
        local = self.experts // self.ep
        order = [rank * local + turn for turn in range(local) for rank in range(self.ep)]
        return order[: percent * self.experts // 100]


@dataclass(frozen=True)
class Group:
    """One of ZeRO's parameter groups on a rank."""

    sizes: tuple[int, ...]
    """Of its parameters, in order."""
    shared_by: int
    """Ranks that divide its optimizer state among them."""
    part: int
    """Which part is this rank's."""
    expert: bool

    @property
    def parameters(self) -> int:
        """All together."""
        return sum(self.sizes)

    @property
    def padded(self) -> int:
        """Parameters with what DeepSpeed adds to cut them into equal, aligned parts."""
        multiple = 2 * self.shared_by
        return -(-self.parameters // multiple) * multiple

    @property
    def touched(self) -> int:
        """Parameters and padding of whole tensors of which at least one number is in this rank's part."""
        size = self.padded // self.shared_by
        start, held, offset = self.part * size, 0, 0
        for parameters in self.sizes:
            held += parameters if offset < start + size and offset + parameters > start else 0
            offset += parameters
        return held + max(0, start + size - max(start, self.parameters))


def groups(sizes: FreezeSizes, percent: int, rank: int) -> list[Group]:
    """ZeRO's groups on a rank: matrices and vectors outside of the blocks, and one per expert that trains."""
    # Counted on a model without memory, so that nothing here depends on what DeepSpeed made of it.
    with torch.device("meta"):
        model = make_model(sizes.model)
    outside = [p for name, p in model.named_parameters() if ".mlp." not in name]
    found = []
    for matrices in (True, False):
        own = tuple(p.numel() for p in outside if (p.dim() >= 2) is matrices)
        found.append(Group(own, sizes.ranks, rank, False))
    local, frozen = sizes.experts // sizes.ep, sizes.frozen_experts(percent)
    first = rank % sizes.ep * local
    train = sizes.layers * sum(k not in frozen for k in range(first, first + local))
    expert = Group((sizes.d * sizes.width,) * 3, sizes.ranks // sizes.ep, rank // sizes.ep, True)
    return found + [expert] * train


def expected(sizes: FreezeSizes, percent: int, rank: int, leaving: int) -> dict[str, int]:
    """Bytes on a rank by FORMULAS; of `token rows` the ranks' mean.

    Args:
        sizes: of the run.
        percent: of the experts are frozen.
        rank: of all.
        leaving: rows that the rank hands over to the exchange on the way to the experts, all blocks together.
    """
    width, found = sizes.torch_dtype.itemsize, groups(sizes, percent, rank)

    def reduced(expert: bool) -> int:
        return width * sum(group.parameters for group in found if group.expert is expert)

    def gathered(expert: bool) -> int:
        return width * sum(group.padded for group in found if group.expert is expert and group.shared_by > 1)

    return {
        "optimizer": sum(12 * group.padded // group.shared_by + 4 for group in found),
        "gradients": width * sum(group.padded // group.shared_by for group in found),
        "gradients_held": width * sum(group.touched for group in found),
        "gradients_in_backward": reduced(True) + reduced(False),
        "expert gradients": reduced(True),
        "all gradients": reduced(False),
        "expert weights": gathered(True),
        "all weights": gathered(False),
        "token rows": 4 * width * sizes.d * leaving,
    }


def expected_freed(sizes: FreezeSizes, percent: int, rank: int) -> dict[str, float]:
    """Optimizer bytes on a rank that freezing gives back: of weights and moments, of step counters, of padding."""
    before, after = groups(sizes, 0, rank), groups(sizes, percent, rank)
    frozen = before[len(after) :]  # experts stand at the end and are all alike
    return {
        "weights_and_moments": sum(12 * group.parameters / group.shared_by for group in frozen),
        "step_counters": 4 * len(frozen),
        "padding": sum(12 * (group.padded - group.parameters) / group.shared_by for group in frozen),
    }


def step_flops(sizes: FreezeSizes, percent: int, load: list[list[int]]) -> Ledger:
    """FLOPs of one step of all ranks.

    Args:
        sizes: of the run.
        percent: of the experts that are frozen.
        load: (blocks, experts) tokens of the step that went to each expert.
    """
    frozen = sizes.frozen_experts(percent)
    modes = ["frozen" if k in frozen else "training" for k in range(sizes.experts)]
    blocks = [
        {"layer": layer, "mode": "specialising", "experts": modes, "load": tokens} for layer, tokens in enumerate(load)
    ]
    ledger = Ledger()
    block = MocteConfig.from_dict(sizes.config()["mocte"])
    ledger.step(config_sizes(sizes.model), sizes.tokens * sizes.ranks, sizes.context, block, blocks)
    return ledger
