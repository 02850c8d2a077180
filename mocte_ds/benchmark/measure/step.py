"""Times a run's model in this process: a training step at the run's batch, and forward passes without a gradient."""

import torch
from torch import Tensor, nn

from mocte_ds.benchmark.measure.clock import Clock
from mocte_ds.benchmark.measure.memory import require_memory
from mocte_ds.benchmark.measure.run_plan import RunPlan
from mocte_ds.training.model import Forward, make_model

REPEATS = 3


def step_seconds(plan: RunPlan, clock: Clock) -> float:
    """Shortest seconds of forward and backward of the whole global batch, micro-batch after micro-batch.

    The optimizer is left out, which makes a step shorter and the checks' share of it larger.

    Raises:
        MocteError: the model does not fit into memory.
    """
    model, ids = _model(plan, clock)
    forward = Forward(model, None)

    def step() -> None:
        for _ in range(plan.tokens_per_step // (plan.micro_batch * plan.context)):
            forward.loss(model(**forward.inputs(ids[:, :-1])), ids[:, 1:]).backward()
        model.zero_grad(set_to_none=False)

    return clock.seconds(step, REPEATS)[0]


@torch.no_grad()
def forward_seconds(plan: RunPlan, clock: Clock, sequences: int) -> float:
    """Shortest seconds of a forward pass over some sequences at once, as a check makes it over its probe set."""
    model, ids = _model(plan, clock, sequences)
    inputs = Forward(model, None).inputs(ids[:, :-1])
    return clock.seconds(lambda: model(**inputs), REPEATS)[0]


def _model(plan: RunPlan, clock: Clock, sequences: int | None = None) -> tuple[nn.Module, Tensor]:
    """The model and token ids (B, T + 1) of a micro-batch."""
    sequences = sequences or plan.micro_batch
    tokens = sequences * plan.context
    # Weights and gradients; some thirty numbers per token and feature in a layer; logits in fp32, three times.
    layers = sum(34 * plan.sizes.hidden_size + 8 * layer.ffn_width for layer in plan.sizes.layers)
    scores = 6 * plan.model.num_heads * plan.context * len(plan.sizes.layers)
    needed = 8 * plan.model.num_params() + tokens * (layers + scores) * 2
    needed += 14 * tokens * plan.model.vocab_size
    require_memory(needed, clock.device, f"a training step of {plan.path}", "Measure a smaller run (--small).")
    dtype = torch.bfloat16 if plan.dtype == "bf16" else torch.float32
    torch.manual_seed(0)
    model = make_model(plan.model).to(clock.device, dtype)
    return model, torch.randint(plan.model.vocab_size, (sequences, plan.context + 1), device=clock.device)
