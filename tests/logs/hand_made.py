"""A model and a loop that know nothing of launch/pretrain.py, on this rank, and what the engine says of each step."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

VOCAB, LENGTH, MICRO, TURNS, STEPS, SAVED_AT = 48, 24, 4, 2, 20, 10
SECRET = "nobody-may-read-this"


class Model(nn.Module):
    """Embeddings, two FFNs, and an output matrix, made by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, 32)
        self.ffns = nn.ModuleList(nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)) for _ in range(2))
        self.head = nn.Linear(32, VOCAB)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = self.words(input_ids)
        for ffn in self.ffns:
            x = x + ffn(F.layer_norm(x, x.shape[-1:]))
        return self.head(x)


def config(**changes: Any) -> dict[str, Any]:
    """DeepSpeed config; ``changes`` go into the "mocte" block."""
    block = {
        "modules": "ffns.*",
        "num_experts": 2,
        "ep_size": 2,
        "total_steps": STEPS,
        "check_every": 0.1,
        "spectrum": {"rank": 4, "rows": 128, "documents": 32},
        "clusters": {"deadline": 0.2, "not_before": 0.05},
        "freeze": {"policy": "trainability", "rows": 16, "iterations": 6, "after_checks": 20},
    }
    return {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": TURNS,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 3000},
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 5e-3}},
        "comet": {"enabled": False, "api_key": SECRET},
        "mocte": {**block, **changes},
    }


def engine_of(settings: dict[str, Any]) -> Any:
    """A new engine with the same first weights on every call."""
    import mocte_ds

    torch.manual_seed(0)
    return mocte_ds.initialize(model=Model(), config=settings)[0]


def loss_of(engine: Any, step: int, turn: int) -> torch.Tensor:
    """Of a micro-batch of this rank."""
    draw = torch.Generator().manual_seed(1000 * step + 10 * turn + engine.global_rank)
    ids = torch.randint(VOCAB, (MICRO, LENGTH + 1), generator=draw).cumsum(1) % VOCAB
    return F.cross_entropy(engine(input_ids=ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def steps(engine: Any, last: int) -> list[dict[str, Any]]:
    """Train up to a step, freezing an expert at step 12; what the engine says of each step, all ranks together."""
    found = []
    while engine.global_steps < last:
        step, total, rate = engine.global_steps, 0.0, engine.optimizer.param_groups[0]["lr"]
        for turn in range(TURNS):
            loss = loss_of(engine, step, turn)
            total += loss.item() / TURNS
            if turn == TURNS - 1:
                size = engine.mocte.optimizer_bytes()
            engine.backward(loss)
            engine.step()
        everywhere: list[Any] = [None] * 2
        torch.distributed.all_gather_object(everywhere, (total, size))
        modes = [str(expert.mode) for block in engine.mocte.blocks for expert in block.experts]
        found.append(
            {
                "step": engine.global_steps,
                "tokens": engine.tokens_seen,
                "loss": sum(part[0] for part in everywhere) / 2,
                "lr": rate,
                "grad_norm": float(engine.get_global_grad_norm()),
                "optimizer_bytes_by_rank": [part[1] for part in everywhere],
                "expert_load": engine.mocte.expert_load(),
                "frozen_experts": modes.count("frozen"),
                "training_experts": modes.count("training"),
            }
        )
        if engine.global_steps == 12:
            engine.mocte.freeze(0, 1)
    return found


def logged(folder: str, csv: str | None, name_it: bool, resume: str) -> dict[str, Any]:
    """One start of the script; the first one ends some steps after its checkpoint, as if it had been killed.

    Args:
        folder: of the logs and checkpoints.
        csv: folder of DeepSpeed's CSV monitor, or None.
        name_it: name the folder in the block, not by a call.
        resume: "no", or whether the checkpoint is loaded "before" or "after" the call of log_to.
    """
    settings = config(**({"log": folder} if name_it else {}))
    if csv:
        settings["csv_monitor"] = {"enabled": True, "output_path": csv, "job_name": "run"}
    engine = engine_of(settings)
    events: list[dict[str, Any]] = []
    engine.mocte.on_event(lambda event: events.append(json.loads(json.dumps(event))))
    if resume == "before":
        engine.load_checkpoint(folder)
    if not name_it:
        engine.mocte.log_to(folder)
    if resume == "after":
        engine.load_checkpoint(folder)
    found = steps(engine, SAVED_AT)
    if resume == "no":
        engine.save_checkpoint(folder)
        return {"steps": found, "undone": steps(engine, SAVED_AT + 3), "events": events}
    found += steps(engine, STEPS)
    experts = [[(str(e.mode), e.trainability) for e in block.experts] for block in engine.mocte.blocks]
    engine.destroy()
    return {
        "steps": found,
        "events": events,
        "experts": experts,
        "files": sorted(p.name for p in Path(folder).iterdir()),
    }


def unlogged(csv: str) -> list[dict[str, Any]]:
    """A run whose only log is DeepSpeed's CSV monitor."""
    settings = config()
    settings["csv_monitor"] = {"enabled": True, "output_path": csv, "job_name": "run"}
    return steps(engine_of(settings), 6)


def exchanges(folder: str) -> list[list[int]]:
    """Calls of torch.distributed in each of three steps, without a log and with one."""
    from torch import distributed

    found, counts = list[list[int]](), [0]
    names = ("all_gather", "all_reduce", "broadcast", "barrier", "all_gather_object", "all_gather_into_tensor")
    for name in (*names, "broadcast_object_list", "gather", "reduce", "reduce_scatter_tensor", "send"):
        plain = getattr(distributed, name)

        def call(*args: Any, _plain: Any = plain, **rest: Any) -> Any:
            counts[0] += 1
            return _plain(*args, **rest)

        setattr(distributed, name, call)

    for log in (False, True):
        engine = engine_of(config(auto=False))
        for handle in engine.mocte.blocks:
            engine.mocte.emerge(block=handle.index)
        if log:
            engine.mocte.log_to(folder)
        found.append([])
        for step in range(3):
            counts[0] = 0
            for turn in range(TURNS):
                engine.backward(loss_of(engine, step, turn))
                engine.step()
            found[-1].append(counts[0])
    return found


def refused(folder: str) -> dict[str, str]:
    """Every way in which log_to is refused, by its message; the run can go on after each."""
    from mocte_ds.errors import MocteError

    engine, out, found = engine_of(config()), Path(folder), {}
    rank = engine.global_rank

    def attempt(name: str, act: Any) -> None:
        try:
            act()
            found[name] = "no error"
        except MocteError as error:
            found[name] = str(error)

    attempt("theirs", lambda: engine.mocte.log_to(out / "theirs"))
    attempt("file", lambda: engine.mocte.log_to(out / "file" / "logs"))
    attempt("busy", lambda: engine.mocte.log_to(out / "busy"))
    attempt("apart", lambda: engine.mocte.log_to(out / f"rank{rank}"))
    attempt("works", lambda: engine.mocte.log_to(out / "mine"))
    attempt("twice", lambda: engine.mocte.log_to(out / "mine"))
    attempt("other checkpoint", lambda: engine.load_checkpoint(out / "none", tag="step1"))
    steps(engine, 1)
    if rank == 0:
        opened = engine.step_log._folder._files
        opened._files["metrics"] = open("/dev/full", "w", buffering=1)
    for turn in range(TURNS):
        engine.backward(loss_of(engine, 1, turn))
        attempt("full", engine.step)  # the last thing that a step does, so that no rank waits for rank 0
    engine.destroy()
    late = engine_of(config())
    steps(late, 1)
    attempt("late", lambda: late.mocte.log_to(out / "late"))
    again = engine_of(config())
    again.mocte.log_to(out / "mine")
    steps(again, 2)
    return found
