"""A small run on several ranks with an emergence, freezes and a thaw, and the same run in plain PyTorch on one."""

from typing import Any

import torch
from torch import Tensor, nn

HIDDEN, WIDTH, EXPERTS, BATCH = 16, 24, 4, 8
LEARNING_RATE, DECAY = 1e-2, 0.1


class FFN(nn.Module):
    """A gated FFN with a bias, so that units have parameters with and without weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, WIDTH)
        self.up_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.down_proj = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Net(nn.Module):
    """Two residual FFNs; called as net(features=..., target=...), returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(HIDDEN, HIDDEN)
        self.layers = nn.ModuleList([FFN(), FFN()])

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        x = self.inlet(features)
        for layer in self.layers:
            x = x + layer(x)
        return (x.float() - target.float()).square().mean()


def batch(step: int, part: int) -> tuple[Tensor, Tensor]:
    """Micro-batch number ``part`` of a step."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    shape = (BATCH, HIDDEN)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def gate_weight(layer: int) -> Tensor:
    """Fixed routing directions."""
    return torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(77 + layer))


# step -> actions before it; freezes hit different ranks, all experts of a rank (ep 2: 0 and 1), all of a block.
PLAN: dict[int, list[tuple]] = {
    4: [("emerge", 0)],
    8: [("emerge", 1), ("freeze", 0, 3)],
    12: [("freeze", 0, 0), ("freeze", 0, 1), ("freeze", 1, 2)],
    16: [("freeze", 0, 2)],
    20: [("thaw", 0, 1)],
}
STEPS, PARTS = 26, 4


def global_step(engine: Any, step: int, dtype: torch.dtype = torch.float32) -> float:
    """This rank's micro-batches of an optimizer step; their mean loss."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    total = 0.0
    for turn in range(PARTS // world):
        features, target = batch(step, turn * world + rank)
        loss = engine(features=features.to(dtype), target=target)
        engine.backward(loss)
        engine.step()
        total += loss.item() / (PARTS // world)
    return total


def clipped_step(optimizers: dict[nn.Parameter, torch.optim.AdamW], clip: float) -> Tensor:
    """Clip the gradients of all parameters together and step each; their norm before."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in optimizers]
    norm = torch.cat([g.reshape(-1) for g in gradients]).norm()
    for parameter, gradient in zip(optimizers, gradients, strict=True):
        parameter.grad = gradient * (clip / (norm + 1e-6)).clamp(max=1.0)
        optimizers[parameter].step()
    return norm


def run_distributed(options: dict[str, Any]) -> dict[str, Any]:
    """The run on this rank; returns losses, norms, bytes and this rank's parameters by global name."""
    import mocte_ds

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    model = Net()
    config = {
        "train_batch_size": BATCH * PARTS,
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": PARTS // world,
        "gradient_clipping": options.get("clip", 0.5),
        "bf16": {"enabled": options.get("bf16", False)},
        "zero_optimization": {
            "stage": options["stage"],
            "reduce_bucket_size": options.get("bucket", 700),
            "overlap_comm": options.get("overlap", False),
        },
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LEARNING_RATE, "weight_decay": DECAY, "torch_adam": True},
        },
        "mocte": {"modules": "layers.*", "num_experts": EXPERTS, "ep_size": options["ep"], "auto": False},
    }
    engine, *_ = mocte_ds.initialize(model=model, config=config)
    dtype = torch.bfloat16 if options.get("bf16") else torch.float32
    losses, norms, sizes = [], [], []
    for step in range(STEPS):
        for action, block, *rest in PLAN.get(step, []):
            if action == "emerge":
                engine.mocte.emerge(block=block)
                bank = engine.mocte.blocks[block].block.banks[0]
                bank.gate.key.set(gate_weight(block), torch.zeros(EXPERTS))
            else:
                getattr(engine.mocte, action)(block=block, expert=rest[0])
        losses.append(global_step(engine, step, dtype))
        norms.append(float(engine.get_global_grad_norm()))
        sizes.append(engine.mocte.optimizer_bytes())
    weights = {}
    local = EXPERTS // options["ep"]
    first = (rank % options["ep"]) * local
    for name, parameter in engine.module.named_parameters():
        head, found, tail = name.partition("deepspeed_experts.")
        if found:
            number, _, rest = tail.partition(".")
            name = f"{head}{found}{int(number) + first}.{rest}"
        weights[name] = parameter.detach().float().clone()
    modes = [[str(expert.mode) for expert in handle.experts] for handle in engine.mocte.blocks]
    return {"losses": losses, "norms": norms, "bytes": sizes, "weights": weights, "modes": modes}


def run_reference(clip: float = 0.5) -> dict[str, Any]:
    """The same run with torch.optim.AdamW, one optimizer a parameter that exists while the parameter trains (fp32)."""
    torch.manual_seed(0)
    net = Net()
    experts: dict[int, list[FFN]] = {}
    optimizers: dict[nn.Parameter, torch.optim.AdamW] = {}

    def admit(parameter: nn.Parameter) -> None:
        decay = DECAY if parameter.dim() >= 2 else 0.0
        optimizers[parameter] = torch.optim.AdamW([parameter], lr=LEARNING_RATE, weight_decay=decay)

    for parameter in net.parameters():
        admit(parameter)

    def forward(features: Tensor, target: Tensor) -> Tensor:
        x = net.inlet(features)
        for i, layer in enumerate(net.layers):
            if i not in experts:
                x = x + layer(x)
                continue
            index = (x.detach() @ gate_weight(i).T).argmax(1)
            outputs = torch.stack([expert(x) for expert in experts[i]], dim=1)
            x = x + outputs[torch.arange(len(x)), index]
        return (x - target).square().mean()

    losses, norms = [], []
    for step in range(STEPS):
        for action, block, *rest in PLAN.get(step, []):
            if action == "emerge":
                dense = net.layers[block]
                experts[block] = [FFN() for _ in range(EXPERTS)]
                for expert in experts[block]:
                    for parameter, source in zip(expert.parameters(), dense.parameters(), strict=True):
                        parameter.data.copy_(source.data)
                        admit(parameter)
                        old = optimizers[source].state[source]
                        optimizers[parameter].state[parameter] = {key: value.clone() for key, value in old.items()}
                for source in dense.parameters():
                    del optimizers[source]
            elif action == "freeze":
                for parameter in experts[block][rest[0]].parameters():
                    del optimizers[parameter]
                    parameter.requires_grad_(False)
            else:
                for parameter in experts[block][rest[0]].parameters():
                    parameter.requires_grad_(True)
                    admit(parameter)
        for parameter in optimizers:
            parameter.grad = None
        total = 0.0
        for part in range(PARTS):
            loss = forward(*batch(step, part)) / PARTS
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(clipped_step(optimizers, clip).item())
    weights = {f"inlet.{name}": p.detach() for name, p in net.inlet.named_parameters()}
    for block, members in experts.items():
        for k, expert in enumerate(members):
            for name, parameter in expert.named_parameters():
                path = f"layers.{block}.banks.0.deepspeed_moe.experts.deepspeed_experts.{k}.{name}"
                weights[path] = parameter.detach()
    return {"losses": losses, "norms": norms, "weights": weights}
