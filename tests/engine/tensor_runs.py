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


def settings(tensor: int, ep_size: int, **changes: Any) -> dict[str, Any]:
    """Config of the run; the data-parallel ranks share its global batch."""
    freeze = {"policy": "progress", "rows": 32, "iterations": 6, "checks": 1, "after_checks": 2, "beta": 0.5}
    made = runs.config(ep_size=ep_size, probe_tokens=768, conflict_every=1, **{"freeze": freeze, **changes})
    del made["bf16"]
    if tensor > 1:
        made["tensor_parallel"] = {"autotp_size": tensor}
    return made


def model(kind: str = "llama", tied: bool = False, seed: int = 0, **changes: Any) -> Any:
    """A model with two key-value heads, the same on every call with a seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": runs.VOCAB, "num_key_value_heads": 2}
    more = {"head_dim": 8, "tie_word_embeddings": tied, "use_cache": False, **sizes, **changes}
    attention = more.pop("attn_implementation", None)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **more), attn_implementation=attention)


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
    """What two tensor ranks say of batches, draws, gradients and weights that differ between them."""
    import mocte_ds

    found = {}
    rank = dist.get_rank()
    made = model("phi", resid_pdrop=0.1)
    torch.manual_seed(rank)  # all ranks take the first one's
    engine, *_ = mocte_ds.initialize(model=made, config=settings(2, 2))
    step(engine, 0, [])
    ids, _ = runs.batch(0, rank)
    found["batch"] = refused(lambda: engine(input_ids=ids, labels=ids))
    found["length"] = refused(lambda: engine(input_ids=ids[:, : 9 + rank]))
    found["arguments"] = refused(lambda: engine(ids, **({"labels": ids} if rank else {})))
    norm = engine.module.model.final_layernorm.weight
    hook = norm.register_hook(lambda gradient: gradient * (1 + rank))
    found["gradient"] = refused(lambda: step(engine, 1, []))
    hook.remove()
    engine.optimizer.zero_grad()
    torch.manual_seed(rank)
    found["dropout"] = refused(lambda: step(engine, 1, []))
    engine.optimizer.zero_grad()
    unit = engine.optimizer.uncut()["model.layers.0.mlp.dense"]
    found["before"] = refused(lambda: engine.save_checkpoint(save, tag="whole"))
    unit[0][0] += 1e-6 * rank
    found["weights"] = refused(lambda: engine.save_checkpoint(save, tag="apart"))
    found["state dict"] = refused(engine.module_state_dict)
    return found


def faults_of_one_group(saved: str) -> dict[str, Any]:
    """What four ranks say of faults on the last two, and of a checkpoint of another ep_size."""
    import mocte_ds

    rank, found = dist.get_rank(), dict[str, Any]()
    for ep_size in (1, 4):
        found[f"ep_size {ep_size}"] = other_layout(settings(2, ep_size), saved)
    engine, *_ = mocte_ds.initialize(model=model(), config=settings(2, 2))
    step(engine, 0, [])
    ids, _ = runs.batch(0, max(rank, 2))
    found["batch"] = refused(lambda: engine(input_ids=ids, labels=ids))
    hook = engine.module.model.norm.weight.register_hook(lambda gradient: gradient * (2 if rank == 3 else 1))
    found["gradient"] = refused(lambda: step(engine, 1, []))
    hook.remove()
    return found


def new_run_with_weights(saved: str, number: int) -> dict[str, Any]:
    """On one rank that cuts nothing: the error of a resume, and losses on the batches of a step before it is done."""
    import mocte_ds
    from mocte_ds.training.init import InitialWeights

    found: dict[str, Any] = {"resumed": other_layout(settings(1, 1), saved)}
    init, made = InitialWeights(saved), model(seed=1)
    init.fill(made)
    engine, *_ = mocte_ds.initialize(model=made, config=settings(1, 1))
    init.begin(engine.mocte)
    found["modes"] = [[str(expert.mode) for expert in block.experts] for block in engine.mocte.blocks]
    parts = []
    for part in range(4):
        ids, _ = runs.batch(number, part)
        with torch.no_grad():
            parts.append(float(engine(input_ids=ids, labels=ids).loss))
    found["losses"] = [(parts[0] + parts[1]) / 2, (parts[2] + parts[3]) / 2]
    return found
