"""Times one block's forward and backward pass in this process, with all experts training and with all frozen."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mocte_ds.benchmark.measure.clock import Clock
from mocte_ds.benchmark.measure.freeze_plan import FreezeSizes
from mocte_ds.benchmark.measure.llama import llama_ffn
from mocte_ds.benchmark.measure.memory import require_memory
from mocte_ds.config import MocteConfig
from mocte_ds.controller.birth import set_gate
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.moe import Block, BlockMode, attach

FORMULA = (
    "recovered = (seconds with all experts training - seconds with all frozen) / seconds of the weight-gradient "
    "products alone; by FLOPs these are 1/3 of forward and backward"
)


def measure_block(sizes: FreezeSizes, tokens: int, clock: Clock, repeats: int) -> dict[str, Any]:
    """Seconds of a block with ep_size 1 on random features that need a gradient, as in the middle of a model.

    What is compared is timed in turns and the shortest times count, so that other work on the machine falls out.

    Args:
        sizes: of the run.
        tokens: routed at once.
        clock: of the device.
        repeats: turns.

    Returns:
        "seconds" of each, "recovered" (see FORMULA), the same against plain FFNs ("recovered_of_plain": the difference
        that `requires_grad` makes to as many FFNs on the same rows without any routing), and "rows" of the experts.

    Raises:
        MocteError: the sizes do not fit into memory.
    """
    d, f, dtype = sizes.d, sizes.width, sizes.torch_dtype
    weights, activations = 6 * (2 * sizes.experts + 1) * d * f, tokens * (8 * d + 8 * f)
    what = f"a block of {sizes.experts} experts of {d} x {f} on {tokens} tokens"
    needed = dtype.itemsize * (weights + activations)
    require_memory(needed, clock.device, what, "Give fewer --block-tokens or a smaller --width.")
    torch.manual_seed(0)
    block = _block(sizes, clock)
    hidden = torch.randn(1, tokens, d, device=clock.device, dtype=dtype)
    block(hidden)
    rows = block.banks[0].deepspeed_moe.exp_counts.tolist()
    plain = _UnroutedExperts(sizes, rows).to(clock.device, dtype)
    arms = {
        "training": _passes(block, hidden, True),
        "frozen": _passes(block, hidden, False),
        "plain_training": _passes(plain, hidden, True),
        "plain_frozen": _passes(plain, hidden, False),
        "weight_gradients": _weight_gradients(rows, d, f, hidden),
    }
    seconds = dict.fromkeys(arms, float("inf"))
    for _ in range(repeats):
        for name, work in arms.items():
            # Its first call, which takes the memory over that the one before it left, is not timed.
            seconds[name] = min(seconds[name], clock.seconds(work, 2)[0])
    saved = seconds["training"] - seconds["frozen"]
    return {
        "tokens": tokens,
        "rows": rows,
        "seconds": seconds,
        "recovered": saved / seconds["weight_gradients"],
        "recovered_of_plain": saved / (seconds["plain_training"] - seconds["plain_frozen"]),
        "share_saved": saved / seconds["training"],
        "share_by_flops": 1 / 3,
        "formula": FORMULA,
    }


class _UnroutedExperts(nn.Module):
    """FFNs on consecutive rows of fixed number."""

    def __init__(self, sizes: FreezeSizes, rows: list[int]) -> None:
        super().__init__()
        self.rows, self.ffns = rows, nn.ModuleList([llama_ffn(sizes.model) for _ in rows])

    def forward(self, hidden: Tensor) -> Tensor:
        chunks = hidden[0].split(self.rows)
        return torch.cat([ffn(chunk) for ffn, chunk in zip(self.ffns, chunks, strict=True)])[None]


def _block(sizes: FreezeSizes, clock: Clock) -> Block:
    """A block whose experts run, on a gate of random directions."""
    holder = nn.Module()
    holder.mlp = llama_ffn(sizes.model)
    router = {"kind": "random"}
    config = MocteConfig.from_dict({"modules": "mlp", "num_experts": sizes.experts, "auto": False, "router": router})
    holder.to(clock.device, sizes.torch_dtype)
    (block,) = attach(holder, config)
    block.to(clock.device)
    set_gate(block, config, mesh_of_processes())
    block.mode = BlockMode.SPECIALISING
    return block


def _passes(module: nn.Module, hidden: Tensor, train: bool) -> Callable[[], None]:
    """Forward and backward; gradients are dropped afterwards, as at the end of a step."""
    experts = module.banks[0].local_experts if isinstance(module, Block) else module
    parameters = list(experts.parameters())
    inputs, gradient = hidden.detach().clone().requires_grad_(), torch.randn_like(hidden)

    def passes() -> None:
        for parameter in parameters:
            parameter.requires_grad_(train)
        module(inputs).backward(gradient)
        inputs.grad = None
        for parameter in parameters:
            parameter.grad = None

    return passes


def _weight_gradients(rows: list[int], d: int, f: int, like: Tensor) -> Callable[[], None]:
    """The products alone: gradients of two (f, d) matrices and a (d, f) one of each expert."""
    features = [torch.randn(n, d, device=like.device, dtype=like.dtype) for n in rows]
    units = [torch.randn(n, f, device=like.device, dtype=like.dtype) for n in rows]

    def products() -> None:
        for x, h in zip(features, units, strict=True):
            _ = h.T @ x, h.T @ x, x.T @ h

    return products
