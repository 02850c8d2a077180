"""Planned bytes against those of real runs, and the times against arithmetic by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mocte_ds.flops.model_sizes import model_sizes
from mocte_ds.plan.layouts import Machine, layout_of, plan, task_of
from mocte_ds.plan.memory import Layout, Task, memory
from mocte_ds.plan.parameters import count_parameters
from mocte_ds.plan.speed import Hardware, speed
from mocte_ds.training.run_config import RunConfig, read_run
from tests.spawn import spawn

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
MODEL = {"model_type": "llama", "vocab_size": 512, "max_position_embeddings": 32, **SIZES}
BLOCK = {"modules": "model.layers.*.mlp", "num_experts": 4, "auto": False, "total_steps": 100}
LORA = {"expert": {"kind": "lora", "width": 24}, "router": {"kind": "random", "weight": "softmax", "learn": True}}
# Ranks, ep_size, stage, tensor ranks, changes of the "mocte" block.
LAYOUTS = [(2, 1, 1, 1, {}), (2, 2, 2, 1, {}), (2, 2, 2, 1, LORA), (2, 1, 3, 1, {}), (4, 2, 2, 1, {}), (4, 2, 2, 2, {})]


def settings(ep_size: int, stage: int, changes: dict[str, Any], tensor: int = 1) -> dict[str, Any]:
    return {
        "tensor_parallel": {"autotp_size": tensor},
        "train_micro_batch_size_per_gpu": 2,
        # All weights are cut up at stage 3, as those of large models are.
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "mocte": {**BLOCK, "ep_size": ep_size, **changes},
    }


def measured(config: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Bytes of this rank before and after all blocks have emerged, and with half of its experts frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import mocte_ds

    torch.manual_seed(0)
    engine, *_ = mocte_ds.initialize(model=LlamaForCausalLM(LlamaConfig(**MODEL)), config=config)
    found = {}
    for phase in ("warm-up", "after", "half frozen"):
        if phase == "after":
            for block in range(len(engine.mocte.blocks)):
                engine.mocte.emerge(block)
        if phase == "half frozen":
            for block in range(len(engine.mocte.blocks)):
                for expert in (0, 2):
                    engine.mocte.freeze(block, expert)
        ids = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(1))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        held = engine.optimizer.held_gradients() if config["zero_optimization"]["stage"] < 3 else []
        parameters = list(engine.module.parameters())
        parts = [getattr(p, "ds_tensor", p) for p in parameters]
        found[phase] = {
            "weights": sum(part.numel() * part.element_size() for part in parts),
            "gradients": sum(gradient.nbytes for gradient in held)
            + sum(p.grad.nbytes for p in parameters if p.grad is not None),
        }
        engine.step()
        found[phase]["optimizer"] = engine.optimizer.optimizer_bytes()
    return found


@pytest.mark.parametrize(("ranks", "ep_size", "stage", "tensor", "changes"), LAYOUTS)
def test_bytes_are_those_of_real_runs(
    ranks: int, ep_size: int, stage: int, tensor: int, changes: dict[str, Any]
) -> None:
    config = settings(ep_size, stage, changes, tensor)
    task, layout = small_task(config), Layout(ranks, ep_size, stage, 2, False, tensor=tensor)
    for rank, found in enumerate(spawn(measured, ranks, config, timeout=240, deepspeed=True)):
        for phase, bytes_of in found.items():
            planned = memory(task, layout, phase)
            for cause, size in bytes_of.items():
                if size:  # stages 1 and 3 hold gradients elsewhere
                    assert planned[cause] == pytest.approx(size, rel=0.05), (rank, phase, cause)
            assert bytes_of["weights"] and bytes_of["optimizer"]
    assert stage != 2 or found["after"]["gradients"]


def small_task(config: dict[str, Any]) -> Task:
    """Of the small runs, without a run file."""
    from mocte_ds.config import MocteConfig
    from mocte_ds.training.model import TransformersModel

    model = TransformersModel(hf=MODEL)
    values = {"prepared": "nowhere"}
    training = {"steps": 10, "batch_tokens": 256, "micro_batch": 2}
    run = RunConfig(model=model, data=values, training=training, evaluation=None, watch=None, deepspeed=config)
    parameters, sizes, mocte = count_parameters(run)
    assert isinstance(mocte, MocteConfig)
    return Task(parameters, sizes, mocte, 32, 512, 2, 5000, on_cpu=True)


def test_parameters_are_those_of_the_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(LlamaConfig(**MODEL))
    parameters = small_task(settings(2, 2, {})).parameters
    assert parameters.trunk + parameters.dense == sum(p.numel() for p in dense.parameters())
    assert parameters.expert == 3 * 64 * 192 and parameters.blocks == 3
    assert parameters.total == parameters.trunk + 3 * 4 * 3 * 64 * 192
    assert parameters.active == sum(p.numel() for p in dense.parameters())  # one of four experts, of the FFN's width
    assert small_task(settings(2, 2, {})).sizes == model_sizes(dense)


def test_the_7b_run_file_gives_the_numbers_of_the_real_layout() -> None:
    """Bytes that were measured with small runs and computed for this file by hand before there was a tool."""
    run = read_run(ROOT / "launch" / "runs" / "llama-7b.yaml")
    task, layout = task_of(run), layout_of(run, 64)
    after, before = memory(task, layout, "after"), memory(task, layout, "warm-up")
    # Trunk and dense FFNs; trunk and one of eight experts per block; the last block's FFN while its experts are born.
    assert before["weights"] == after["weights"] == pytest.approx(13.48e9, rel=0.01)
    assert memory(task, layout, "emergence")["weights"] == pytest.approx(13.48e9 + 2 * 4.329e9 / 32, rel=0.001)
    assert before["optimizer"] == pytest.approx(1.26e9, rel=0.01)
    assert after["optimizer"] == pytest.approx(6.94e9, rel=0.01)
    assert after["gradients"] == pytest.approx(1.16e9, rel=0.01)
    assert after["feature samples"] == pytest.approx(1.28e9, rel=0.01)
    assert task.parameters.total == pytest.approx(37.04e9, rel=0.001)


HARDWARE = Hardware(memory=80e9, gemm=1e14, link=1e11, net=1e10, disk=1e9)


def test_a_step_by_hand() -> None:
    """2 ranks, EP 2, ZeRO-2, one host."""
    task = small_task(settings(2, 2, {}))
    step = speed(task, Layout(2, 2, 2, 2, False), HARDWARE, 8, 256, True)
    p, tokens = task.parameters, 128
    matrices = p.trunk - 512 * 64 - 64 * 7  # no lookup of embeddings, no norms
    products = 6 * (matrices + 3 * p.expert) + 12 * 3 * 64 * 32
    assert step.flops_per_token == pytest.approx(products, rel=0.02)  # and gates
    assert step.wire["gradients"] == 2 * (0.5 * p.trunk)  # an expert is on one rank only
    assert step.wire["tokens"] == 2 * 2 * 2 * tokens * 64 * 3 * 0.5
    assert step.compute == pytest.approx(step.flops_per_token * 256 / 2 / 1e14)
    assert step.communication == pytest.approx(sum(step.wire.values()) / 1e11)
    far = speed(task, Layout(2, 2, 2, 2, False), HARDWARE, 1, 256, True)
    assert far.communication == pytest.approx(sum(step.wire.values()) / 1e10)


def test_layouts_that_do_not_fit_are_left_out() -> None:
    run = read_run(ROOT / "launch" / "runs" / "llama-7b.yaml")
    roomy = plan(run, Machine(64, 8, 80e9, HARDWARE))
    tight = plan(run, Machine(64, 8, 32e9, HARDWARE))
    assert roomy["fits"] and not tight["fits"]
    assert tight["layouts_that_fit"] < roomy["layouts_that_fit"]
    assert all(one["bytes"] <= 0.95 * 32e9 for one in tight["layouts"])
    seconds = [one["seconds"] for one in roomy["layouts"]]
    assert seconds == sorted(seconds)
    nothing = plan(run, Machine(64, 8, 5e9, replace(HARDWARE, memory=5e9)))
    assert nothing["layouts"] == [] and not nothing["fits"]
