"""A tiny Llama in fp32 whose attention is cut over tensor ranks, or not: the same steps either way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.engine import runs

HAND = 20
"""Step after which an expert of the second block is frozen by hand."""
MIXED = {"router": {"kind": "random", "weight": "softmax", "learn": True, "top_k": 2, "aux": 0.01, "normalise": True}}
VARIANTS: dict[str, dict[str, Any]] = {
    "two experts of a token, learned": {"mocte": MIXED},
    "bypasses, spread": {"mocte": {"expert": {"kind": "lora", "width": 8}, "ep_size": 2}},
    "tied embeddings, recomputed, spread": {"mocte": {"ep_size": 2}, "tied": True, "recompute": True},
    "normalised heads, stage 1": {"mocte": {}, "kind": "qwen3", "zero_optimization": {"stage": 1}},
    "a frozen front, bf16": {"mocte": {"freeze": {"prefix": {"layers": 1}}}, "bf16": {"enabled": True}},
    "moving clusters, two banks, spread": {
        "mocte": {"banks": [{"kind": "online", "directions": 8}, {"kind": "token"}], "ep_size": 2}
    },
}


def settings(tensor: int, ep_size: int, **changes: Any) -> dict[str, Any]:
    """Config of the run; the data-parallel ranks share its global batch."""
    freeze = {"policy": "progress", "rows": 32, "iterations": 6, "checks": 1, "after_checks": 2, "beta": 0.5}
    made = runs.config(ep_size=ep_size, probe_tokens=768, conflict_every=1, **{"freeze": freeze, **changes})
    del made["bf16"]
    if tensor > 1:
        made["tensor_parallel"] = {"autotp_size": tensor}
    return made


def model(kind: str = "llama", tied: bool = False, **changes: Any) -> Any:
    """A model with two key-value heads, the same on every call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": runs.VOCAB, "num_key_value_heads": 2}
    more = {"head_dim": 8, "tie_word_embeddings": tied, "use_cache": False, **sizes, **changes}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **more))


def step(engine: Any, number: int, losses: list[float]) -> None:
    """One optimizer step of two micro-batches; the mean losses over the data-parallel ranks."""
    data = engine.mesh.data
    for turn in range(2):
        ids, domain = runs.batch(number, turn * data.size + data.rank)
        engine.mocte.annotate(domain, ["low", "high"])
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().double()
        dist.all_reduce(total, group=data.group)
        losses.append(float(total) / data.size)


def train(
    config: dict[str, Any], first: int, last: int, load: str = "", save: str = "", save_after: int = 0, export: str = ""
) -> dict[str, Any]:
    """Steps ``first`` to ``last`` - 1."""
    import mocte_ds

    engine, *_ = mocte_ds.initialize(model=model(), config=config)
    mocte, mesh, events = engine.mocte, engine.mesh, list[dict]()
    mocte.on_event(events.append)
    if load:
        engine.load_checkpoint(load)
    losses, norms, held = list[float](), list[float](), list[int]()
    for number in range(first, last):
        step(engine, number, losses)
        norms.append(float(engine.get_global_grad_norm()))
        if number == HAND:
            training = [k for k, expert in enumerate(mocte.blocks[1].experts) if expert.mode == "training"]
            before = mocte.optimizer_bytes()
            mocte.freeze(block=1, expert=training[0])
            held = [before, mocte.optimizer_bytes()]
        if save and number + 1 == save_after:
            engine.save_checkpoint(save)
    return {
        "losses": losses,
        "norms": norms,
        "events": json.loads(json.dumps(events)),
        "modes": [[str(expert.mode) for expert in block.experts] for block in mocte.blocks],
        "load": mocte.expert_load(),
        "held": held,
        "bytes": mocte.optimizer_bytes(),
        "export": mocte.export(export) if export else None,
        "batch": engine.train_batch_size(),
        "axes": {name: (getattr(mesh, name).rank, getattr(mesh, name).size) for name in vars(mesh)},
        "files": sorted(path.name for path in Path(save).glob("*/*")) if save else [],
    }


def variants(tensor: int) -> dict[str, list[float]]:
    """By name of a variant, losses and gradient norms around births by hand; the global batch is one rank's."""
    import mocte_ds

    found = {}
    for name, given in VARIANTS.items():
        changes = dict(given)
        block = {"ep_size": 1, **changes.pop("mocte"), "auto": False}
        ep_size = block.pop("ep_size") if tensor > 1 else 1
        block.pop("ep_size", None)
        kind, tied, recompute = (changes.pop(key, or_else) for key, or_else in _PLAIN.items())
        config = {**settings(tensor, ep_size, **{"freeze": {"policy": "off"}, **block}), **changes}
        made = model(kind, tied)
        if recompute:
            made.gradient_checkpointing_enable({"use_reentrant": False})
        engine, *_ = mocte_ds.initialize(model=made, config=config)
        numbers: list[float] = []
        for number in range(6):
            step(engine, number, numbers)
            numbers.append(float(engine.get_global_grad_norm()))
            if number == 1:
                engine.mocte.emerge(block=0)
                engine.mocte.emerge(block=1)
            if number == 3:
                for expert in range(len(engine.mocte.blocks[0].experts)):
                    engine.mocte.freeze(block=0, expert=expert)
                if engine.mocte.config.freeze.prefix.layers:
                    engine.mocte.freeze_prefix(1)
        found[name] = numbers
        engine.destroy()
    return found


_PLAIN = {"kind": "llama", "tied": False, "recompute": False}


def refused(act: Callable[[], Any]) -> str:
    """The error that a call ends with."""
    from mocte_ds.errors import MocteError

    try:
        act()
    except MocteError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def other_layout(config: dict[str, Any], load: str) -> str:
    """The error of a resume."""
    return refused(lambda: train(config, 0, 0, load))


def faults(save: str) -> dict[str, str]:
    """What two tensor ranks say of batches, gradients and weights that differ between them."""
    import mocte_ds

    found = {}
    rank = dist.get_rank()
    engine, *_ = mocte_ds.initialize(model=model(attention_dropout=0.1), config=settings(2, 2))
    step(engine, 0, [])  # dropout is drawn alike
    ids, _ = runs.batch(0, rank)
    found["batch"] = refused(lambda: engine(input_ids=ids, labels=ids))
    found["length"] = refused(lambda: engine(input_ids=ids[:, : 9 + rank]))
    found["arguments"] = refused(lambda: engine(ids, **({"labels": ids} if rank else {})))
    norm = engine.module.model.norm.weight
    hook = norm.register_hook(lambda gradient: gradient * (1 + rank))
    found["gradient"] = refused(lambda: step(engine, 1, []))
    hook.remove()
    engine.optimizer.zero_grad()
    unit = engine.optimizer.uncut()["model.layers.0.mlp.dense"]
    found["before"] = refused(lambda: engine.save_checkpoint(save, tag="whole"))
    unit[0][0] += 1e-6 * rank
    found["weights"] = refused(lambda: engine.save_checkpoint(save, tag="apart"))
    found["state dict"] = refused(engine.module_state_dict)
    return found
