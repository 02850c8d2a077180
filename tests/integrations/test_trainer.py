"""transformers' Trainer with blocks trains as a loop by hand, resumes, goes back to its best model, and exports."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mocte_ds.convert.hf.export import export
from mocte_ds.report import read_run
from tests.engine import runs
from tests.flops.test_mfu import DENSE
from tests.integrations import trainer_runs
from tests.spawn import spawn

EVERY, PEAK = 4, 1e9
_LOAD = """import sys, torch
from transformers import AutoModelForCausalLM
import mocte_ds.convert.hf.register
ids = torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    torch.save((type(model).__name__, model(input_ids=ids).logits), sys.argv[3])
"""


def by_trainer(folder: str, stage: int, resume: bool) -> dict[str, Any]:
    """Ten steps with an optimizer that Trainer makes; what was logged, heard and written."""
    from transformers import TrainerCallback

    from mocte_ds.integrations.transformers import MocteTrainer

    class Ear(TrainerCallback):
        heard: list[tuple[int, str]] = []

        def on_mocte_event(self, args: Any, state: Any, control: Any, event: dict[str, Any]) -> None:
            self.heard.append((event["step"], event["event"]))

    out, Ear.heard = Path(folder) / "out", []
    config = trainer_runs.config(stage, peak_tflops=PEAK / 1e12)
    config["csv_monitor"] = {"enabled": True, "output_path": f"{folder}/csv", "job_name": f"resumed-{resume}"}
    args = trainer_runs.arguments(
        out,
        config,
        eval_strategy="steps",
        eval_steps=EVERY,
        save_strategy="steps",
        save_steps=EVERY,
    )
    data = trainer_runs.rows()
    trainer = MocteTrainer(model=runs.model(), args=args, train_dataset=data, eval_dataset=data[:24], callbacks=[Ear()])
    trainer.train(resume_from_checkpoint=str(out / f"checkpoint-{EVERY}") if resume else None)
    engine = trainer.engine
    found = {
        "log": trainer.state.log_history,
        "heard": Ear.heard,
        "weights": trainer_runs.weights(engine),
        "sequences": engine.mocte.passes.sequences,
        "total_steps": engine.mocte.total_steps,
        "evaluated": trainer.evaluate(),
    }
    trainer.save_model()
    trainer.save_model()  # again, in the place of the first
    trainer.save_model(str(Path(folder) / "elsewhere"))
    try:
        trainer.model.save_pretrained(folder)
    except Exception as error:
        found["refused"] = str(error)
    engine.eval()
    ids = torch.stack([row["input_ids"] for row in data[:4]])
    with torch.no_grad():
        found["logits"] = engine(input_ids=ids).logits
    if engine.mesh.world.rank == 0:
        torch.save(ids, Path(folder) / "ids.pt")
    return found


def by_hand(stage: int) -> dict[str, Any]:
    """The same steps in a loop of one's own."""
    from transformers import get_linear_schedule_with_warmup
    from transformers.trainer_pt_utils import get_parameter_names

    import mocte_ds

    model = runs.model()
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], ["bias", "norm"]))
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed) is wanted], "weight_decay": decay}
        for wanted, decay in ((True, 0.1), (False, 0.0))
    ]
    settings = {
        "train_micro_batch_size_per_gpu": trainer_runs.MICRO,
        "gradient_accumulation_steps": trainer_runs.TURNS,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "mocte": {**trainer_runs.BLOCK, "total_steps": trainer_runs.STEPS},
    }
    engine, *_ = mocte_ds.initialize(
        model=model,
        config=settings,
        model_parameters=groups,
        optimizer=lambda given: torch.optim.AdamW(given, lr=trainer_runs.RATE),
        lr_scheduler=lambda optimizer: get_linear_schedule_with_warmup(optimizer, 2, trainer_runs.STEPS),
    )
    rank, data, losses = torch.distributed.get_rank(), trainer_runs.rows(), []
    for step in range(trainer_runs.STEPS):
        parts = []
        for turn in range(trainer_runs.TURNS):
            first = ((step * trainer_runs.TURNS + turn) * 2 + rank) * trainer_runs.MICRO
            ids = torch.stack([row["input_ids"] for row in data[first : first + trainer_runs.MICRO]])
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            parts.append(loss.detach())
        total = torch.stack(parts).mean()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / 2)
    return {"losses": losses, "weights": trainer_runs.weights(engine)}


def losses_of(log: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in log if "loss" in row]


def loaded(folder: Path, ids: Path) -> tuple[str, torch.Tensor]:
    """Class and logits of a folder in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, folder, ids, ids.with_name("logits.pt")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(ids.with_name("logits.pt"))


@pytest.mark.parametrize("stage", [2, 3])
def test_trains_as_a_loop_by_hand_and_exports(tmp_path: Path, stage: int) -> None:
    first, second = spawn(by_trainer, 2, str(tmp_path), stage, False, timeout=240, deepspeed=True)
    expected = spawn(by_hand, 2, stage, timeout=240, deepspeed=True)[0]
    assert losses_of(first["log"]) == pytest.approx(expected["losses"], abs=2e-5)
    assert first["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=1e-4, msg=name)
    assert first["sequences"] == trainer_runs.STEPS * trainer_runs.TURNS * 2 * trainer_runs.MICRO
    assert first["total_steps"] == trainer_runs.STEPS
    emergences = [step for step, event in first["heard"] if event == "emergence"]
    assert emergences == [5, 5] and second["heard"] == []
    experts = [row["mocte/training_experts"] for row in first["log"] if "loss" in row]
    assert experts == [0] * 4 + [8] * 6
    assert first["evaluated"]["eval_loss"] < expected["losses"][0]
    for rank in (first, second):
        assert "engine.mocte.export" in rank["refused"]
    for folder in (tmp_path / "out", tmp_path / "elsewhere"):
        kind, logits = loaded(folder, tmp_path / "ids.pt")
        assert kind == "MocteBlocksForCausalLM"
        torch.testing.assert_close(logits, first["logits"], rtol=1e-4, atol=1e-4)
    checkpoint = tmp_path / "out" / f"checkpoint-{trainer_runs.STEPS}"
    assert not (checkpoint / "config.json").exists()
    export(checkpoint, tmp_path / "from checkpoint")
    torch.testing.assert_close(loaded(tmp_path / "from checkpoint", tmp_path / "ids.pt")[1], logits, rtol=0, atol=1e-5)
    # On the same data again from the middle, on to the same end.
    again = spawn(by_trainer, 2, str(tmp_path), stage, True, timeout=240, deepspeed=True)[0]
    assert losses_of(again["log"]) == pytest.approx(losses_of(first["log"]), abs=1e-6)
    assert all(torch.equal(again["weights"][name], first["weights"][name]) for name in first["weights"])
    assert again["sequences"] == first["sequences"] and [s for s, e in again["heard"] if e == "emergence"] == [5, 5]
    log = read_run(tmp_path / "out")
    assert [row["step"] for row in log.metrics] == list(range(1, trainer_runs.STEPS + 1)), "both starts, no step twice"
    assert [row["loss"] for row in log.metrics] == pytest.approx(losses_of(first["log"]), abs=1e-4)
    assert [event["step"] for event in log.of_kind("emergence")] == [5, 5] and len(log.of_kind("resume")) == 1
    told = [row["mocte/mfu"] for row in first["log"] if "loss" in row]
    rows = [line.split(",") for line in (tmp_path / "csv" / "resumed-False" / "mocte_mfu.csv").read_text().splitlines()]
    assert [float(value) for _, value in rows[1:]] == pytest.approx(told) and len(told) == trainer_runs.STEPS
    for row in log.metrics[:EVERY]:  # of the first start, before the emergence
        flops = DENSE * trainer_runs.MICRO * trainer_runs.TURNS * 2 * runs.LENGTH / 768
        assert row["mfu"] == pytest.approx(flops / row["seconds"] / (2 * PEAK))
        assert row["mfu"] == pytest.approx(told[row["step"] - 1])
    evaluated = [row["eval_loss"] for row in first["log"] if "eval_loss" in row][:-1]  # the last one came after train()
    assert [row["validation"]["eval"] for row in log.validations] == pytest.approx(evaluated, abs=1e-4)
    assert log.facts["training"]["steps"] == trainer_runs.STEPS and log.facts["model"]["hf.model_type"] == "llama"


def by_epochs(folder: str) -> dict[str, Any]:
    """Two epochs of 18 sequences in batches of 4, two of them a step: the last step of an epoch has one, of two."""
    from mocte_ds.integrations.transformers import MocteTrainer

    args = trainer_runs.arguments(
        Path(folder), trainer_runs.config(ep_size=1), max_steps=-1, num_train_epochs=2, eval_strategy="epoch"
    )
    data = trainer_runs.rows(18)
    trainer = MocteTrainer(
        model=runs.model(), args=args, train_dataset=data, eval_dataset={"near": data[:8], "far": data[8:12]}
    )
    trainer.train()
    engine = trainer.engine
    births = [str(block.mode) for block in engine.mocte.blocks]
    return {
        "steps": (engine.mocte.total_steps, trainer.state.max_steps, trainer.state.global_step, engine.global_steps),
        "tokens": engine.tokens_seen,
        "modes": births,
        "log": trainer.state.log_history,
    }


def test_epochs_are_the_budget_and_evaluations_are_logged(tmp_path: Path) -> None:
    (found,) = spawn(by_epochs, 1, str(tmp_path), timeout=240, deepspeed=True)
    assert found["steps"] == (6, 6, 6, 6)
    assert found["tokens"] == 2 * 18 * runs.LENGTH and found["modes"] == ["specialising"] * 2
    log = read_run(tmp_path)
    assert log.facts["training"]["steps"] == 6
    for name in ("near", "far"):
        told = [row[f"eval_{name}_loss"] for row in found["log"] if f"eval_{name}_loss" in row]
        assert [row["validation"][name] for row in log.validations] == pytest.approx(told) and len(told) == 2
    assert [row["step"] for row in log.validations] == [3, 6]
    near, far, mean = (log.validations[-1]["validation"][name] for name in ("near", "far", "mean"))
    assert mean == pytest.approx((near + far) / 2)


def best_of(folder: str, stage: int) -> dict[str, Any]:
    """Trains with metrics that call step 4, before the emergence, the best."""
    from transformers import Trainer, TrainerCallback

    from mocte_ds.integrations.transformers import prepare_trainer_class

    class Scored(Trainer):
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            metrics = {"eval_score": -abs(self.state.global_step - EVERY)}
            self.log(metrics)
            return metrics

    kept: dict[int, Any] = {}

    class Keep(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            modes = [str(block.mode) for block in trainer.engine.mocte.blocks]
            kept[state.global_step] = (modes, trainer_runs.weights(trainer.engine))

    args = trainer_runs.arguments(
        Path(folder),
        trainer_runs.config(stage, trainer_runs.OPTIMIZER),
        eval_strategy="steps",
        eval_steps=EVERY,
        save_strategy="steps",
        save_steps=EVERY,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        save_total_limit=1,
    )
    data = trainer_runs.rows()
    trainer = prepare_trainer_class(Scored)(
        model=runs.model(), args=args, train_dataset=data, eval_dataset=data[:8], callbacks=[Keep()]
    )
    trainer.train()
    modes = [str(block.mode) for block in trainer.engine.mocte.blocks]
    found = {"kept": kept, "now": (modes, trainer_runs.weights(trainer.engine))}
    trainer.save_model()
    return {**found, "class": type(trainer).__name__, "bytes": trainer.engine.mocte.optimizer_bytes()}


@pytest.mark.parametrize("stage", [1, 3])
def test_goes_back_to_the_best_model(tmp_path: Path, stage: int) -> None:
    found = spawn(best_of, 2, str(tmp_path), stage, timeout=240, deepspeed=True)[0]
    assert found["class"] == "MocteScored" and sorted(found["kept"]) == [4, 8, 10]
    (modes, best), (now_modes, now) = found["kept"][EVERY], found["now"]
    assert now_modes == modes == ["warmup"] * 2 and found["kept"][8][0] == ["specialising"] * 2
    dense = [name for name in best if ".banks." not in name]
    assert dense and all(torch.equal(now[name], best[name]) for name in dense)
    assert any(not torch.equal(found["kept"][8][1][name], best[name]) for name in dense)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{EVERY}"]


def refusals(folder: str) -> dict[str, str]:
    """What is refused, on one rank, each by its message."""
    import os

    from mocte_ds.errors import MocteError
    from mocte_ds.integrations.transformers import MocteTrainer, refilled

    found, data = {}, trainer_runs.rows(16)

    def refused(name: str, make: Any) -> None:
        try:
            make()
            found[name] = "nothing"
        except MocteError as error:
            found[name] = str(error)

    def trainer(config: dict[str, Any] | None = None, **more: Any) -> Any:
        config = trainer_runs.config(ep_size=1) if config is None else config
        args = trainer_runs.arguments(Path(folder), config, **{"max_steps": 1, **more})
        return MocteTrainer(model=runs.model(), args=args, train_dataset=data)

    refused("no block", lambda: trainer({**trainer_runs.config(), "mocte": None}))
    refused("no DeepSpeed", lambda: trainer({}))
    refused("batch size", lambda: trainer(auto_find_batch_size=True))
    refused("compile", lambda: trainer(torch_compile=True))
    cut = {**trainer_runs.config(ep_size=1), "tensor_parallel": {"autotp_size": 2}}
    refused("tensor parallelism", lambda: trainer(cut))
    os.environ["WORLD_SIZE"] = "2"
    refused("world", trainer)
    os.environ["WORLD_SIZE"] = "1"
    used = trainer(save_strategy="steps", save_steps=1, save_only_model=True)
    refused("evaluate", lambda: used.evaluate(data))
    refused("save", used.save_model)
    used.train()
    refused("twice", used.train)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.9)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    refused("scheduler", lambda: refilled(optimizer))
    parameter.sum().backward()
    optimizer.step()
    refused("stepped", lambda: refilled(optimizer))
    return found


def test_what_is_refused(tmp_path: Path) -> None:
    (found,) = spawn(refusals, 1, str(tmp_path), timeout=240, deepspeed=True)
    checkpoint = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {"model.safetensors", "config.json", "training_args.bin"} <= checkpoint and "global_step1" not in checkpoint
    for name, told in {
        "no block": 'no DeepSpeed config with a "mocte" block',
        "no DeepSpeed": 'no DeepSpeed config with a "mocte" block',
        "batch size": "TrainingArguments.auto_find_batch_size",
        "compile": "TrainingArguments.torch_compile",
        "tensor parallelism": "tensor_parallel.autotp_size = 2 is not supported by MocteTrainer",
        "world": "sees 1 process, and the launcher has started 2",
        "evaluate": "need the engine that train() makes",
        "save": "model.save_pretrained(FOLDER)",
        "twice": "train() was called twice",
        "scheduler": "the optimizer has a scheduler",
        "stepped": "has stepped already",
    }.items():
        assert told in found[name], (name, found[name])
