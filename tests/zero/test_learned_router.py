"""A trained router on several ranks against plain PyTorch: choices, weights, Switch's loss, AdamW."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.spawn import spawn
from tests.zero.small_run import (
    BATCH,
    DECAY,
    EXPERTS,
    FFN,
    HIDDEN,
    LEARNING_RATE,
    PARTS,
    Net,
    batch,
    clipped_step,
    gate_weight,
    global_step,
)

STEPS, EMERGES, AUX, CLIP = 14, 3, 0.05, 0.5


def run_distributed(options: dict[str, Any]) -> dict[str, Any]:
    """Two blocks with learned routers on this rank; losses and the routers' weights."""
    import mocte_ds

    world = torch.distributed.get_world_size()
    torch.manual_seed(0)
    model = Net()
    config = {
        "train_batch_size": BATCH * PARTS,
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": PARTS // world,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": options["stage"], "reduce_bucket_size": 700},
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": DECAY, "torch_adam": True}},
        "mocte": {
            "modules": "layers.*",
            "num_experts": EXPERTS,
            "ep_size": options["ep"],
            "auto": False,
            "router": {"kind": options["kind"], "weight": "softmax", "learn": True, "aux": AUX},
        },
    }
    engine, *_ = mocte_ds.initialize(model=model, config=config)
    losses = []
    for step in range(STEPS):
        if step == EMERGES:
            for block in range(2):
                engine.mocte.emerge(block=block)
                bank = engine.mocte.blocks[block].block.banks[0]
                bank.gate.key.set(gate_weight(block), torch.zeros(EXPERTS))
        losses.append(global_step(engine, step))
    gates = [handle.block.banks[0].gate for handle in engine.mocte.blocks]
    return {"losses": losses, "routers": [gate.cluster_residual.detach().clone() for gate in gates]}


@functools.cache
def reference(kind: str) -> dict[str, Any]:
    """The same in plain PyTorch, every expert on every row."""
    torch.manual_seed(0)
    net = Net()
    experts: list[list[FFN]] = []
    # Of the last step's global batch; even before the first.
    shares = [torch.full((EXPERTS,), 1 / EXPERTS) for _ in range(2)]
    loads = [torch.zeros(EXPERTS, dtype=torch.int64) for _ in range(2)]
    routers: list[torch.nn.Parameter] = []
    optimizers: dict[torch.nn.Parameter, torch.optim.AdamW] = {}

    def admit(parameter: torch.nn.Parameter) -> None:
        decay = DECAY if parameter.dim() >= 2 else 0.0
        optimizers[parameter] = torch.optim.AdamW([parameter], lr=LEARNING_RATE, weight_decay=decay)

    for parameter in net.parameters():
        admit(parameter)

    def forward(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        x, even = net.inlet(features), torch.zeros(())
        for i, layer in enumerate(net.layers):
            if not experts:
                x = x + layer(x)
                continue
            prior = (x if kind == "random" else x.detach()) @ gate_weight(i).T
            probability = (prior + x @ routers[i].T).softmax(1)
            index = probability.argmax(1)
            loads[i] += torch.bincount(index, minlength=EXPERTS)
            even = even + AUX * EXPERTS * (shares[i] * probability.mean(0)).sum()
            outputs = torch.stack([expert(x) for expert in experts[i]], dim=1)
            rows = torch.arange(len(x))
            x = x + outputs[rows, index] * probability[rows, index, None]
        return (x - target).square().mean(), even

    losses = []
    for step in range(STEPS):
        if step == EMERGES:
            for dense in net.layers:
                experts.append([FFN() for _ in range(EXPERTS)])
                for expert in experts[-1]:
                    for parameter, source in zip(expert.parameters(), dense.parameters(), strict=True):
                        parameter.data.copy_(source.data)
                        admit(parameter)
                        old = optimizers[source].state[source]
                        optimizers[parameter].state[parameter] = {key: value.clone() for key, value in old.items()}
                for source in dense.parameters():
                    del optimizers[source]
                routers.append(torch.nn.Parameter(torch.zeros(EXPERTS, HIDDEN)))
                admit(routers[-1])
        for parameter in optimizers:
            parameter.grad = None
        total = 0.0
        for part in range(PARTS):
            loss, even = forward(*batch(step, part))
            ((loss + even) / PARTS).backward()
            total += loss.item() / PARTS
        clipped_step(optimizers, CLIP)
        for i, load in enumerate(loads):
            shares[i] = load / load.sum() if load.any() else shares[i]
            load.zero_()
        losses.append(total)
    return {"losses": losses, "routers": [router.detach() for router in routers]}


@pytest.mark.parametrize(
    ("world", "ep", "stage", "kind"), [(1, 1, 1, "token"), (2, 1, 2, "token"), (2, 2, 1, "random"), (2, 2, 2, "token")]
)
def test_a_learned_router_is_that_of_plain_pytorch(world: int, ep: int, stage: int, kind: str) -> None:
    results = spawn(run_distributed, world, {"stage": stage, "ep": ep, "kind": kind}, timeout=120, deepspeed=True)
    expected = reference(kind)
    losses = torch.tensor([result["losses"] for result in results]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(expected["losses"]), rtol=3e-5, atol=1e-6)
    for result in results:
        for found, wanted in zip(result["routers"], expected["routers"], strict=True):
            assert wanted.abs().sum() > 0
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=5e-5)
