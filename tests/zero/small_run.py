"""A small run on several ranks with emergences, freezes and thaws, and what it must be equal to in plain PyTorch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HIDDEN, WIDTH, EXPERTS, BATCH = 16, 24, 4, 8
LEARNING_RATE, DECAY = 1e-2, 0.1
STEPS, PARTS = 25, 4

# step -> actions before it, at steps where fp32 and fp64 part by less than 5e-7: the first step after a thaw is the
# sign of a gradient, which rounding may turn. With ep_size 2 the ranks hold the experts 0, 1 and 2, 3; with 4 one each.
PLAN: dict[int, list[tuple]] = {
    2: [("emerge", 0)],
    4: [("emerge", 1), ("freeze", 0, 3), ("freeze", 1, 0)],  # the second one was born a moment ago
    7: [("freeze", 0, 0), ("freeze", 0, 1)],  # the last ones of rank 0: with ep_size 4 it has none left
    10: [("freeze", 0, 2), ("freeze", 1, 1)],  # all of block 0
    13: [("freeze", 1, 2), ("freeze", 1, 3)],  # all of the model
    17: [("thaw", 0, 1)],
    20: [("thaw", 1, 3), ("freeze", 0, 1)],
}
FINAL_MODES = [["frozen"] * 4, ["frozen", "frozen", "frozen", "training"]]


@dataclass(frozen=True)
class Case:
    """One configuration of the run."""

    world: int = 2
    ep: int = 1
    stage: int = 2
    bucket: int = 700
    """reduce_bucket_size in elements; the largest gradients have 384, all together 10,000."""
    overlap: bool = False
    offload: bool = False
    bf16: bool = False
    sums: bool = False
    """Gradients of micro-batches are added up in fp32."""
    optimizer: str = "torch"
    """`torch` (AdamW), `torch-fused` (the same in one kernel), `fused` or `cpu`: DeepSpeed's."""
    schedule: str = "none"
    """Of the learning rate: `none`, `torch` (LambdaLR) or `deepspeed` (WarmupDecayLR)."""
    recompute: str = ""
    """Activation checkpointing: `reentrant`, `plain` or none."""
    clip: float = 0.5
    persist: int = 0
    """Stage 3: parameters of at most so many elements stay gathered; matrices have 384, vectors 16 or 24."""
    live: int = 10**9
    """Stage 3: elements that are gathered at once at most, and that are gathered ahead."""
    parts: int = 10**12
    """Stage 3: elements of a rank's part of a unit that are stepped at once."""
    record: bool = False
    """Return the gradients of every step, for :func:`replay`."""

    def __str__(self) -> str:
        marks = [f"ranks{self.world}-ep{self.ep}-zero{self.stage}-bucket{self.bucket}"]
        marks += [name for name in ("overlap", "offload", "bf16", "sums") if getattr(self, name)]
        marks += [f"persist{self.persist}"] if self.persist else []
        marks += [f"live{self.live}"] if self.live < 10**9 else []
        marks += [f"parts{self.parts}"] if self.parts < 10**12 else []
        marks += [self.optimizer] if self.optimizer != "torch" else []
        marks += [f"{self.schedule}-schedule"] if self.schedule != "none" else []
        marks += [f"{self.recompute}-recompute"] if self.recompute else []
        return "-".join(marks)


def learning_rate(schedule: str, step: int) -> float:
    """Learning rate of optimizer step ``step``, counted from 0."""
    if schedule == "torch":
        return LEARNING_RATE * (0.55 + 0.45 * math.cos(math.pi * step / STEPS))
    if schedule == "deepspeed":
        # The scheduler is one step late: its first value is set before the first step and once more after it.
        done, warmup = max(0, step - 1), 4
        return LEARNING_RATE * min(done / warmup, (STEPS - done) / (STEPS - warmup))
    return LEARNING_RATE


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

    def __init__(self, recompute: str = "") -> None:
        super().__init__()
        self.recompute = recompute
        self.inlet = nn.Linear(HIDDEN, HIDDEN)
        self.layers = nn.ModuleList([FFN(), FFN()])

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        x = self.inlet(features)
        for layer in self.layers:
            again = self.recompute and torch.is_grad_enabled()
            x = x + (checkpoint(layer, x, use_reentrant=self.recompute == "reentrant") if again else layer(x))
        return (x.float() - target.float()).square().mean()


def batch(step: int, part: int) -> tuple[Tensor, Tensor]:
    """Micro-batch number ``part`` of a step."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    shape = (BATCH, HIDDEN)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def gate_weight(layer: int) -> Tensor:
    """Fixed routing directions."""
    return torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(77 + layer))


def config(case: Case) -> dict[str, Any]:
    """DeepSpeed config of a case."""
    zero: dict[str, Any] = {"stage": case.stage, "reduce_bucket_size": case.bucket, "overlap_comm": case.overlap}
    if case.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if case.stage == 3:
        zero["stage3_param_persistence_threshold"] = case.persist
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = case.live
        zero["sub_group_size"] = case.parts
        zero["stage3_prefetch_bucket_size"] = min(case.live, 50_000_000)
    settings = {
        "train_batch_size": BATCH * PARTS,
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": PARTS // case.world,
        "gradient_clipping": case.clip,
        "bf16": {"enabled": case.bf16},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": case.optimizer == "cpu",
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": DECAY}},
        "mocte": {"modules": "layers.*", "num_experts": EXPERTS, "ep_size": case.ep, "auto": False},
    }
    settings["mocte"]["router"] = {"kind": "token"}
    if case.sums:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    settings["optimizer"]["params"]["torch_adam"] = case.optimizer.startswith("torch")
    if case.optimizer == "torch-fused":
        settings["optimizer"]["params"]["fused"] = True
    if case.schedule == "deepspeed":
        times = {"total_num_steps": STEPS, "warmup_num_steps": 4, "warmup_type": "linear"}
        rates = {"warmup_min_lr": 0.0, "warmup_max_lr": LEARNING_RATE}
        settings["scheduler"] = {"type": "WarmupDecayLR", "params": {**times, **rates}}
    return settings


def global_step(
    engine: Any, step: int, dtype: torch.dtype = torch.float32, before: Callable[[], None] | None = None
) -> float:
    """This rank's micro-batches of an optimizer step; their mean loss.

    Args:
        engine: of the run.
        step: number of the step.
        dtype: of the features.
        before: called when all gradients are there, before the optimizer acts on them.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    total = 0.0
    for turn in range(PARTS // world):
        features, target = batch(step, turn * world + rank)
        loss = engine(features=features.to(engine.device, dtype), target=target.to(engine.device))
        engine.backward(loss)
        if before and turn == PARTS // world - 1:
            before()
        engine.step()
        total += loss.item() / (PARTS // world)
    return total


def clipped_step(optimizers: dict[nn.Parameter, torch.optim.AdamW], clip: float) -> Tensor:
    """Clip the gradients of all parameters together and step each; their norm before."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in optimizers]
    norm = torch.cat([g.reshape(-1) for g in gradients]).norm()
    for parameter, gradient in zip(optimizers, gradients, strict=True):
        parameter.grad = gradient * (clip / (norm + 1e-6)).clamp(max=1.0) if clip else gradient
        optimizers[parameter].step()
    return norm


def act(engine: Any, step: int) -> None:
    """What PLAN has before a step."""
    for action, block, *rest in PLAN.get(step, []):
        if action == "emerge":
            engine.mocte.emerge(block=block)
            engine.mocte.blocks[block].block.banks[0].gate.key.set(gate_weight(block), torch.zeros(EXPERTS))
        else:
            getattr(engine.mocte, action)(block=block, expert=rest[0])


def named_parameters(engine: Any) -> dict[str, nn.Parameter]:
    """This rank's parameters, experts by their global numbers: `layers.0.2.up_proj.weight`."""
    named = {}
    for handle in engine.mocte.blocks:
        for name, unit in engine.mocte.run.registry.units.items():
            head, _, number = name.rpartition(".")
            if head == handle.name and number.isdigit():
                expert = handle.block.banks[0].local_experts[int(number) % len(handle.block.banks[0].local_experts)]
                assert tuple(expert.parameters()) == unit.parameters
                named.update({f"{name}.{key}": parameter for key, parameter in expert.named_parameters()})
        named.update({f"{handle.name}.dense.{key}": p for key, p in handle.block.dense.named_parameters()})
    named.update({f"inlet.{key}": parameter for key, parameter in engine.module.inlet.named_parameters()})
    return named


def weight(parameter: nn.Parameter) -> Tensor:
    """A copy of all of a parameter's weights (under stage 3 collective over the ranks that share it)."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):  # does nothing at other stages
        return parameter.detach().cpu().clone()


def frozen_parameters(engine: Any, named: dict[str, nn.Parameter]) -> list[str]:
    """Names of this rank's parameters that belong to frozen experts."""
    heads = [
        f"{handle.name}.{k}."
        for handle in engine.mocte.blocks
        for k, expert in enumerate(handle.experts)
        if expert.mode == "frozen"
    ]
    return [name for name in named if name.startswith(tuple(heads))]


def run_distributed(case: Case) -> dict[str, Any]:
    """The run on this rank.

    Returns:
        losses, norms and optimizer bytes of every step; weights at the end; modes; names of frozen parameters that
        moved; and where asked the gradients of every step.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    import mocte_ds

    torch.manual_seed(0)
    schedule = (lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, _of_peak)) if case.schedule == "torch" else None
    engine, *_ = mocte_ds.initialize(model=Net(case.recompute), config=config(case), lr_scheduler=schedule)
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    losses, norms, sizes, gradients = [], [], [], []
    still: dict[str, Tensor] = {}
    moved: set[str] = set()
    named = named_parameters(engine)

    def record() -> None:
        trainable = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        # What the ranks share is gathered by all of them in the same order.
        gradients.append({name: safe_get_full_grad(trainable[name]).float().cpu() for name in sorted(trainable)})

    for step in range(STEPS):
        act(engine, step)
        still = {n: still[n] if n in still else weight(named[n]) for n in frozen_parameters(engine, named)}
        losses.append(global_step(engine, step, dtype, record if case.record else None))
        moved |= {name for name, before in still.items() if not torch.equal(weight(named[name]), before)}
        norms.append(float(engine.get_global_grad_norm()))
        sizes.append(engine.mocte.optimizer_bytes())
    modes = [[str(expert.mode) for expert in handle.experts] for handle in engine.mocte.blocks]
    masters = {n: safe_get_full_fp32_param(named[n]).cpu() for n in sorted(named) if named[n].requires_grad}
    # Experts have replaced the dense FFNs, which are freed.
    weights = {name: weight(parameter) for name, parameter in named.items() if ".dense." not in name}
    result = {"losses": losses, "norms": norms, "bytes": sizes, "weights": weights, "masters": masters, "modes": modes}
    return {**result, "moved": sorted(moved), "gradients": gradients, "rate": engine.get_lr()}


def _of_peak(step: int) -> float:
    return learning_rate("torch", step) / LEARNING_RATE


class Reference:
    """One torch.optim.AdamW a parameter, which exists while the parameter trains."""

    def __init__(self, schedule: str) -> None:
        self.schedule = schedule
        self.optimizers: dict[nn.Parameter, torch.optim.AdamW] = {}

    def admit(self, parameter: nn.Parameter, like: nn.Parameter | None = None) -> None:
        """Let a parameter train, with fresh moments or those of another one."""
        decay = DECAY if parameter.dim() >= 2 else 0.0
        optimizer = torch.optim.AdamW([parameter], lr=LEARNING_RATE, weight_decay=decay)
        if like is not None:
            optimizer.state[parameter] = {k: v.clone() for k, v in self.optimizers[like].state[like].items()}
        self.optimizers[parameter] = optimizer

    def step(self, step: int, clip: float) -> float:
        """The optimizers' step; the norm of all gradients before."""
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["lr"] = learning_rate(self.schedule, step)
        return clipped_step(self.optimizers, clip).item()


def run_reference(schedule: str = "none", clip: float = 0.5) -> dict[str, Any]:
    """The whole run in one process and fp32, forward and backward in plain PyTorch too."""
    torch.manual_seed(0)
    net, reference = Net(), Reference(schedule)
    experts: dict[int, list[FFN]] = {}
    for parameter in net.parameters():
        reference.admit(parameter)

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
                dense = list(net.layers[block].parameters())
                experts[block] = [FFN() for _ in range(EXPERTS)]
                for expert in experts[block]:
                    for parameter, source in zip(expert.parameters(), dense, strict=True):
                        parameter.data.copy_(source.data)
                        reference.admit(parameter, source)
                for source in dense:
                    del reference.optimizers[source]
                continue
            for parameter in experts[block][rest[0]].parameters():
                parameter.requires_grad_(action == "thaw")
                if action == "thaw":
                    reference.admit(parameter)
                else:
                    del reference.optimizers[parameter]
        for parameter in reference.optimizers:
            parameter.grad = None
        total = 0.0
        for part in range(PARTS):
            loss = forward(*batch(step, part)) / PARTS
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(reference.step(step, clip))
    weights = {f"inlet.{name}": p.detach() for name, p in net.inlet.named_parameters()}
    for block, members in experts.items():
        for k, expert in enumerate(members):
            weights.update({f"layers.{block}.{k}.{name}": p.detach() for name, p in expert.named_parameters()})
    return {"losses": losses, "norms": norms, "weights": weights}


def replay(case: Case, gradients: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The run's optimizer alone, in one process, on the gradients that the ranks had; all parameters by name.

    Model weights are the fp32 masters rounded to the run's precision; a thawed expert's masters start from them.
    """
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    net, reference = Net(), Reference(case.schedule)
    masters = {f"inlet.{name}": p for name, p in net.inlet.named_parameters()}
    for block, layer in enumerate(net.layers):
        masters.update({f"layers.{block}.dense.{name}": p for name, p in layer.named_parameters()})
    weights: dict[str, Tensor] = {}
    for name, parameter in masters.items():
        weights[name] = parameter.detach().to(dtype)
        parameter.data.copy_(weights[name].float())  # as DeepSpeed makes masters: from the model's own weights
        reference.admit(parameter)
    norms = []
    for step, found in enumerate(gradients):
        for action, block, *rest in PLAN.get(step, []):
            if action == "emerge":
                head = f"layers.{block}.dense."
                for name in [name for name in masters if name.startswith(head)]:
                    for k in range(EXPERTS):
                        born = nn.Parameter(masters[name].detach().clone())
                        reference.admit(born, masters[name])
                        own = f"layers.{block}.{k}.{name.removeprefix(head)}"
                        masters[own], weights[own] = born, weights[name].clone()
                    del reference.optimizers[masters.pop(name)]
                continue
            head = f"layers.{block}.{rest[0]}."
            for name in [name for name in weights if name.startswith(head)]:
                if action == "freeze":
                    del reference.optimizers[masters.pop(name)]
                else:
                    masters[name] = nn.Parameter(weights[name].float())
                    reference.admit(masters[name])
        assert set(found) == set(masters), "the ranks train other parameters than the plan says"
        for name, parameter in masters.items():
            parameter.grad = found[name]
        norms.append(reference.step(step, case.clip))
        weights.update({name: parameter.detach().to(dtype) for name, parameter in masters.items()})
    return {"weights": weights, "masters": {name: p.detach() for name, p in masters.items()}, "norms": norms}
