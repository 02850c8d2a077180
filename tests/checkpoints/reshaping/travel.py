"""What ranks do in the tests of checkpoints that travel from one layout to another."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.checkpoints import runs
from tests.small_models import loss_of
from tests.zero.small_run import Case, Net, act, config, global_step, learning_rate

BATCH, MICRO = 8, 2
END = 22
"""Steps of the small run, some after its last action."""
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"modules": "model.layers.1.mlp", "expert": {"kind": "lora", "width": 16}},
    "banks": {"banks": [{"kind": "token", "bias": False}, {"kind": "previous"}]},
    "router": {"router": {"kind": "token", "bias": False, "weight": "softmax", "learn": True, "aux": 0.05}},
    "front": {"modules": "model.layers.1.mlp", "freeze": {"prefix": {"layers": 1}}},
}
"""What is unlike the small run: kinds of experts, several banks, routers that train, a front that freezes."""


def optimizer_of(engine: Any) -> dict[str, list[Tensor]]:
    """Master weights and moments of what trains on this rank, gathered; experts by their global numbers."""
    moments = ("exp_avg", "exp_avg_sq")
    if not hasattr(engine, "mocte"):
        return _flat_groups(engine.optimizer, moments)
    found = {}
    for unit in engine.mocte.run.registry.units.values():
        state = engine.optimizer.unit_state(unit.name)
        for number, parameter in enumerate(unit.parameters):
            if parameter in state:
                found[f"{unit.name}:{number}"] = [state[parameter][key].clone() for key in ("master", *moments)]
    return found


def _flat_groups(optimizer: Any, moments: tuple[str, ...]) -> dict[str, list[Tensor]]:
    """The same of DeepSpeed's own optimizer, all parameters of a group one after the other."""
    found = {}
    for number, master in enumerate(optimizer.single_partition_of_fp32_groups):
        size = sum(parameter.numel() for parameter in optimizer.bit16_groups[number])
        found[f"group {number}"] = whole = []
        for part in (master, *(optimizer.optimizer.state[master][key] for key in moments)):
            parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, part.detach())
            whole.append(torch.cat(parts)[:size])
    return found


def rates_of(engine: Any) -> dict[str, float]:
    """Learning rate of each unit."""
    return {group["unit"]: group["lr"] for group in engine.optimizer.param_groups}


# ---- the small run, from one layout to the next ----------------------------------------------------------------------


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """A learning rate that keeps a number a group in the checkpoint."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate("torch", step) / 1e-2)


def go_on(case: Case, first: int, last: int, ways: dict[str, tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Some steps of the small run for each way: the folder to load from (or nothing) and the one to save to.

    Returns:
        By way: losses of the steps, and the optimizer when it was loaded and when it was saved.
    """
    import mocte_ds

    results = {}
    for way, (source, out) in ways.items():
        torch.manual_seed(0)
        engine, *_ = mocte_ds.initialize(model=Net(), config=config(case), lr_scheduler=schedule)
        loaded = None
        if source:
            engine.load_checkpoint(source)
            loaded = optimizer_of(engine)
        losses = []
        for step in range(first, last):
            act(engine, step)
            losses.append(global_step(engine, step))
        if out:
            engine.save_checkpoint(out, f"step{last}", client_state={"data_position": last})
        saved = optimizer_of(engine)
        note, rates = engine.checkpoint_engine.note, rates_of(engine)
        results[way] = {"losses": losses, "loaded": loaded, "saved": saved, "note": note, "rates": rates}
        if out and not source:
            results["whole"] = {"losses": losses + [_step(engine, step) for step in range(last, END)]}
            results["whole"].update(saved=optimizer_of(engine), rates=rates_of(engine))
        engine.destroy()
    return results


def _step(engine: Any, step: int) -> float:
    act(engine, step)
    return global_step(engine, step)


# ---- other kinds of runs ---------------------------------------------------------------------------------------------


def settings(world: int, ep_size: int, first: bool = False, **changes: Any) -> dict[str, Any]:
    """DeepSpeed config of a tiny Llama in fp32, whose global batch is the same for any number of ranks."""
    block = {"modules": "model.layers.*.mlp", "num_experts": 4, "ep_size": ep_size, "auto": False, "total_steps": 100}
    block.update(spectrum={"rank": 4, "rows": 256, "documents": 32})
    if "banks" not in changes:
        block["router"] = {"kind": "token", "bias": False}
    return {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": BATCH // MICRO // world,
        "use_data_before_expert_parallelism": first,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 3000},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
        "mocte": {**block, **changes},
    }


def make(name: str, world: int, ep_size: int, first: bool = False) -> Any:
    """An engine of a variant; `dense` is DeepSpeed's own, without blocks."""
    import deepspeed

    import mocte_ds
    from mocte_ds.training import saving

    torch.manual_seed(0)
    model = runs.model()
    values = settings(world, ep_size, first, **VARIANTS.get(name, {}))
    if name != "dense":
        engine = mocte_ds.initialize(model=model, config=values)[0]
    else:
        del values["mocte"]
        groups = [{"params": [p for p in model.parameters() if p.dim() > 1]}]
        groups.append({"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0})
        engine = deepspeed.initialize(model=model, model_parameters=groups, config=values)[0]
    saving.prepare(engine, {})
    return engine


def train(engine: Any, first: int, last: int) -> list[float]:
    """Losses of some steps on this rank; every step's sequences are the same for any number of ranks."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = []
    for step in range(first, last):
        tokens = torch.randint(4, runs.VOCAB, (BATCH, 33), generator=torch.Generator().manual_seed(step))
        turns = BATCH // MICRO // world
        total = 0.0
        for turn in range(turns):
            place = (turn * world + rank) * MICRO
            mine = tokens[place : place + MICRO]
            loss = loss_of(engine, mine[:, :-1], mine[:, 1:])
            engine.backward(loss)
            engine.step()
            total += loss.item() / turns
        losses.append(total)
    return losses


def write_variants(folder: str) -> dict[str, dict[str, Any]]:
    """Train each variant, save it, and train on."""
    from mocte_ds.training import saving

    results = {}
    for name in (*VARIANTS, "dense"):
        engine = make(name, torch.distributed.get_world_size(), 2)
        train(engine, 0, 2)
        if name != "dense":
            for block in range(len(engine.mocte.blocks)):
                engine.mocte.emerge(block)
            train(engine, 2, 4)
            engine.mocte.freeze(0, 1)
            if name == "front":
                engine.mocte.freeze_prefix(1)
        train(engine, 4, 6)
        torch.manual_seed(torch.distributed.get_rank())
        saving.save(engine, Path(folder) / name, "step6", {"data_position": 6 * BATCH})
        saved = optimizer_of(engine)
        results[name] = {"losses": train(engine, 6, 10), "saved": saved}
        engine.destroy()
    return results


def load_variants(folder: str, ep_size: int, first: bool = False) -> dict[str, dict[str, Any]]:
    """Load each variant on this number of ranks and train on."""
    from mocte_ds.training import saving

    results = {}
    for name in (*VARIANTS, "dense"):
        engine = make(name, torch.distributed.get_world_size(), ep_size, first)
        client = saving.load(engine, Path(folder) / name, "step6")
        loaded = optimizer_of(engine)
        losses = train(engine, 6, 10)
        results[name] = {"losses": losses, "loaded": loaded, "client": client["data_position"]}
        results[name].update(note=engine.checkpoint_engine.note, drawn=float(torch.rand(())))
        engine.destroy()
    return results
