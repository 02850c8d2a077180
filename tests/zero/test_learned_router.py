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
MEAN = 0.4
ROUTERS: dict[str, dict[str, Any]] = {
    "plain": {"weight": "softmax", "aux": AUX},
    "switch": {"weight": "softmax", "aux": AUX, "unit_mean": True, "rate": 0.3},
    "loss-free": {"weight": "sigmoid", "aux": 0.0, "unit_mean": True, "rate": 0.1, "balance_rate": 0.05},
    "gain": {"weight": "gain", "aux": 0.0},
}


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
            "router": {"kind": options["kind"], "learn": True, **ROUTERS[options["router"]]},
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
                if bank.gate.router.unit_mean:
                    bank.gate.cluster_mean.fill_(MEAN)
        losses.append(global_step(engine, step))
    gates = [handle.block.banks[0].gate for handle in engine.mocte.blocks]
    found = {"losses": losses, "routers": [gate.cluster_residual.detach().clone() for gate in gates]}
    return {**found, "means": [gate.cluster_mean.item() for gate in gates if gate.router.unit_mean]} | {
        "added": [gate.cluster_correction.clone() for gate in gates if gate.router.weight == "sigmoid"]
    }


@functools.cache
def reference(kind: str, name: str) -> dict[str, Any]:
    """The same in plain PyTorch, every expert on every row."""
    options = {"unit_mean": False, "rate": 1.0, "balance_rate": 0.0, **ROUTERS[name]}
    sigmoid = options["weight"] == "sigmoid"
    means, added = [MEAN, MEAN], [torch.zeros(EXPERTS) for _ in range(2)]
    given: list[list[Tensor]] = [[], []]
    torch.manual_seed(0)
    net = Net()
    experts: list[list[FFN]] = []
    # Of the last step's global batch; even before the first.
    shares = [torch.full((EXPERTS,), 1 / EXPERTS) for _ in range(2)]
    loads = [torch.zeros(EXPERTS, dtype=torch.int64) for _ in range(2)]
    routers: list[torch.nn.Parameter] = []
    optimizers: dict[torch.nn.Parameter, torch.optim.AdamW] = {}

    def admit(parameter: torch.nn.Parameter, router: bool = False) -> None:
        decay = DECAY if parameter.dim() >= 2 and not router else 0.0
        rate = LEARNING_RATE * (options["rate"] if router else 1.0)
        optimizers[parameter] = torch.optim.AdamW([parameter], lr=rate, weight_decay=decay)

    for parameter in net.parameters():
        admit(parameter)

    def forward(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        x, even = net.inlet(features), torch.zeros(())
        for i, layer in enumerate(net.layers):
            if not experts:
                x = x + layer(x)
                continue
            prior = (x if kind == "random" else x.detach()) @ gate_weight(i).T
            logits = prior + x @ routers[i].T
            probability = logits.sigmoid() if sigmoid else logits.softmax(1)
            if options["weight"] == "gain":  # W only weighs, and the prior alone chooses
                logits, probability = prior.detach(), 2 * (x @ routers[i].T).sigmoid()
                index = logits.argmax(1)
            else:
                index = (probability.detach() + added[i]).argmax(1)
            loads[i] += torch.bincount(index, minlength=EXPERTS)
            even = even + options["aux"] * EXPERTS * (shares[i] * probability.mean(0)).sum()
            outputs = torch.stack([expert(x) for expert in experts[i]], dim=1)
            rows = torch.arange(len(x))
            weight = probability[rows, index, None]
            given[i].append(weight.detach())
            x = x + outputs[rows, index] * (weight / means[i] if options["unit_mean"] else weight)
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
                admit(routers[-1], router=True)
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
            added[i] = added[i] + options["balance_rate"] * (load.float().mean() - load).sign()
            load.zero_()
            if given[i]:
                means[i] = 0.95 * means[i] + 0.05 * torch.cat(given[i]).mean().item()
                given[i].clear()
        losses.append(total)
    return {"losses": losses, "routers": [router.detach() for router in routers], "means": means, "added": added}


@pytest.mark.parametrize(
    ("world", "ep", "stage", "kind", "router"),
    [
        (1, 1, 1, "token", "plain"),
        (2, 1, 2, "token", "plain"),
        (2, 2, 1, "random", "switch"),
        (2, 2, 2, "token", "plain"),
        (2, 1, 2, "random", "loss-free"),
        (2, 2, 2, "random", "loss-free"),
        (2, 1, 2, "token", "gain"),
        (2, 2, 1, "random", "gain"),
    ],
)
def test_a_learned_router_is_that_of_plain_pytorch(world: int, ep: int, stage: int, kind: str, router: str) -> None:
    options = {"stage": stage, "ep": ep, "kind": kind, "router": router}
    results = spawn(run_distributed, world, options, timeout=120, deepspeed=True)
    expected = reference(kind, router)
    losses = torch.tensor([result["losses"] for result in results]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(expected["losses"]), rtol=3e-5, atol=1e-6)
    for result in results:
        for found, wanted in zip(result["routers"], expected["routers"], strict=True):
            assert wanted.abs().sum() > 0
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=5e-5)
        assert result["means"] == pytest.approx(expected["means"] if ROUTERS[router].get("unit_mean") else [], rel=1e-5)
        for found, wanted in zip(result["added"], expected["added"], strict=router == "loss-free"):
            assert wanted.abs().sum() > 0
            torch.testing.assert_close(found, wanted)
