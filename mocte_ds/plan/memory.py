"""Bytes of one rank by cause and by phase of a run.

Weights, gradients and optimizer states are exact but for padding (tests/plan compares them with real runs); activations
follow arXiv 2205.05198, equation 2, without the scores of attention, which fused kernels do not keep.
"""

from dataclasses import dataclass

from mocte_ds.config import MocteConfig
from mocte_ds.flops.model_sizes import ModelSizes
from mocte_ds.plan.parameters import Parameters

PHASES = ("warm-up", "emergence", "after", "half frozen", "save")
MASTER = 12
"""Bytes of a weight that trains: the fp32 master and AdamW's two moments."""
_PER_LAYER = 34
"""Bytes of a token's activations in a layer, in half precision, per feature (arXiv 2205.05198)."""
_CONTEXT = 3e9
"""CUDA context, NCCL and the allocator's waste: assumed, not computed."""


@dataclass(frozen=True)
class Layout:
    """How a run is laid out."""

    ranks: int
    ep_size: int
    stage: int
    micro_batch: int
    """Sequences of a forward pass on one rank."""
    recompute: bool
    """Whether the backward pass computes layers again."""
    passes: int = 1
    """Forward passes of an optimizer step on one rank."""
    tensor: int = 1
    """Ranks that matrices outside of the blocks are cut over."""

    def __post_init__(self) -> None:
        assert self.ranks % self.ep_size == 0 and self.ranks % self.tensor == 0


@dataclass(frozen=True)
class Task:
    """What is laid out."""

    parameters: Parameters
    sizes: ModelSizes
    config: MocteConfig | None
    context: int
    """Tokens of a sequence."""
    vocab_size: int
    width: int
    """Bytes of a weight as it computes: 2, or 4 in fp32."""
    bucket: int
    """Numbers of DeepSpeed's reduce bucket."""
    on_cpu: bool = False
    """Whether ranks are processes on a CPU: no context of CUDA."""


def memory(task: Task, layout: Layout, phase: str) -> dict[str, float]:
    """Bytes of one rank by cause.

    Args:
        task: the run.
        layout: of its ranks.
        phase: one of :data:`PHASES`.

    Returns:
        By cause; "sum" is all of them.
    """
    p, cut = task.parameters, layout.ranks // layout.ep_size
    local = p.in_experts // layout.ep_size
    born = phase != "warm-up" and p.blocks > 0
    frozen = 0.5 if phase == "half frozen" else 0.0
    dense = p.dense if not born or p.keeps_dense else 0
    # Each rank has a part of what is cut, and shares all else with those that read other data.
    apart, data = p.cut / layout.tensor if layout.tensor > 1 else 0.0, layout.ranks // layout.tensor
    trunk = p.trunk - p.cut + apart if layout.tensor > 1 else p.trunk
    trained = trunk + p.blocks * p.router * born + dense
    experts = local * (1 - frozen) * born
    three = layout.stage == 3
    if phase == "emergence" and p.blocks:
        dense = max(dense, p.dense // p.blocks)  # the FFN of the last block, until its experts have been born
    weights = (trunk + dense + p.blocks * p.router) / (layout.ranks if three else 1)
    weights += local * born / (cut if three else 1)
    optimizer = MASTER * (trained / data + experts / cut)
    # Stage 1 adds up whole gradients over the passes of a step, and cuts them at the last.
    whole = layout.stage < 2 and layout.passes > 1
    gradients = task.width * (trained + experts if whole else trained / data + experts / cut)
    bucket = task.width * 2.0 * min(task.bucket, trained + experts) * (1 + (experts > 0)) if layout.stage else 0.0
    found = {
        "weights": task.width * weights,
        "optimizer": optimizer,
        "gradients": gradients,
        "reduce buckets": bucket,
        "activations": activations(task, layout, born),
        "feature samples": _samples(task, layout),
        "transient": 0.0,
        "context, NCCL (assumed)": 0.0 if task.on_cpu else _CONTEXT,
    }
    if phase == "emergence" and p.blocks:
        # What the experts inherit: masters and moments of one dense FFN, beside its own features.
        found["transient"] = MASTER * p.dense / p.blocks
    if phase == "save" and born:
        # Copies of what this rank writes, until it is written.
        found["transient"] = task.width * local / p.blocks * -(-p.blocks // cut)
    return {**found, "sum": sum(found.values())}


def activations(task: Task, layout: Layout, born: bool) -> float:
    """Bytes that a forward pass leaves for the backward pass, and the loss's own."""
    tokens, d, layers = layout.micro_batch * task.context, task.sizes.hidden_size, len(task.sizes.layers)
    # Twice where the width is that of fp32.
    scale = task.width / 2
    layer = scale * _PER_LAYER * tokens * d
    kept = scale * 2.0 * tokens * d * layers + layer if layout.recompute else layer * layers
    # Logits as they come, in fp32, and their gradient.
    loss = tokens * task.vocab_size * (task.width + 8.0)
    if born and layout.ep_size > 1:
        # Rows that travel to experts and back; the even share. Twice that where all go to one expert of a pair.
        kept += 4.0 * task.width * tokens * d * task.parameters.per_token * (1 if layout.recompute else layers)
    return kept + loss


def _samples(task: Task, layout: Layout) -> float:
    """Features that are kept for the next check, fp32."""
    if task.config is None:
        return 0.0
    spectrum = task.config.spectrum
    rows = 0
    for wanted in (spectrum.rows << spectrum.doublings, spectrum.documents):
        rows += min(wanted, 4 * -(-wanted * layout.tensor // layout.ranks) + 64)
    return 4.0 * rows * task.sizes.hidden_size * task.parameters.blocks


def host_memory(task: Task, layout: Layout, per_host: int) -> float:
    """Bytes on a host at the start, where every rank makes the whole model before it moves.

    In the type that it computes in, with a layer and what lies outside of layers in fp32 while their weights are drawn;
    then the experts of one block at a time, as they are made. Stage 3 cuts them up one parameter at a time; a rank's
    parts stay on its device, which on a CPU is the host.
    """
    p, layers = task.parameters, len(task.sizes.layers)
    tables = task.vocab_size * task.sizes.hidden_size + task.sizes.outside - task.sizes.tied
    drawn = (4 - task.width) * (tables + (p.trunk + p.dense - tables) / layers)
    experts = task.width * p.in_experts
    made = experts / layout.ep_size / max(p.blocks, 1)
    parts = experts / layout.ranks if layout.stage == 3 and task.on_cpu else 0.0
    return per_host * (task.width * (p.trunk + p.dense) + max(drawn, made, parts))


def checkpoint(task: Task, born: bool) -> float:
    """Bytes of one checkpoint: what the model computes with, and what the optimizer holds of it."""
    p = task.parameters
    trained = p.trunk + (p.in_experts if born else 0) + (p.dense if not born or p.keeps_dense else 0)
    return (task.width + MASTER) * trained
