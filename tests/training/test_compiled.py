"""torch.compile of what lies around the blocks: the same numbers, and a loss without logits in fp32."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from mocte_ds.config import MocteConfig
from mocte_ds.errors import ConfigError
from mocte_ds.moe.attach import attach
from mocte_ds.training.compiled import compile_regions
from mocte_ds.training.model import Forward
from mocte_ds.training.run_config import RunConfig, read_run
from tests.spawn import spawn

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
BLOCK = {"modules": "model.layers.*.mlp", "num_experts": 2, "auto": False, "total_steps": 100}


def run(compiled: bool, kind: str, recomputes: bool) -> tuple[list[float], list[str]]:
    """Losses of nine steps with an emergence and a freeze, and what was compiled."""
    import mocte_ds

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, use_cache=False))
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "fused": True}},
        "mocte": {**BLOCK, "router": {"kind": "hash"}, "expert": {"kind": kind}},
    }
    engine, *_ = mocte_ds.initialize(model=model, config=config)
    regions, losses = compile_regions(engine.module) if compiled else [], []
    forward, generator = Forward(model, None, compiled), torch.Generator().manual_seed(1)
    for step in range(9):
        if step == 3:
            for block in range(2):
                engine.mocte.emerge(block=block)
        if step == 6:
            engine.mocte.freeze(block=0, expert=1)
        ids = torch.randint(SIZES["vocab_size"], (4, 17), generator=generator)
        loss = forward.loss(engine(**forward.inputs(ids[:, :-1])), ids[:, 1:])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, regions


@pytest.mark.parametrize(("kind", "recomputes"), [("ffn", False), ("lora", True)])
def test_losses_are_those_without_compilation(kind: str, recomputes: bool) -> None:
    plain, _ = spawn(run, 1, False, kind, recomputes, timeout=100, deepspeed=True)[0]
    compiled, regions = spawn(run, 1, True, kind, recomputes, timeout=400, deepspeed=True)[0]
    parts = ("self_attn", "mlp.dense", "input_layernorm", "post_attention_layernorm")
    assert regions == [f"model.layers.{layer}.{part}" for layer in range(2) for part in parts]
    torch.testing.assert_close(compiled, plain, rtol=0, atol=2e-5)


def test_loss_is_that_of_fp64_and_makes_no_logits_in_fp32() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    logits = torch.randn(2, 64, 512).bfloat16().requires_grad_()
    labels = torch.randint(512, (2, 64))
    labels[0, :5] = -100
    exact = logits.detach().double().requires_grad_()
    expected = nn.functional.cross_entropy(exact.flatten(0, 1), labels.flatten(), ignore_index=-100)
    expected.backward()
    made = []
    for compiled in (False, True):
        forward = Forward(model, None, compiled)
        forward.loss(logits, labels).backward()  # compiles
        assert logits.grad is not None and exact.grad is not None
        assert (logits.grad.double() - exact.grad).norm() < 4e-3 * exact.grad.norm()
        logits.grad = None
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            loss = forward.loss(logits, labels)
            loss.backward()
        made.append(sum(max(0, one.self_cpu_memory_usage) for one in seen.key_averages()))
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
        logits.grad = None
    size = logits.numel() * logits.element_size()
    assert made[0] > 4 * size, "logits in fp32 and their gradient"
    assert made[1] < 1.5 * size, "the gradient in bf16 alone"


def test_dense_layers_and_models_without_layers() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"norm": nn.LayerNorm(4), "out": nn.Linear(4, 4)})])

    class Ffns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlps = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2)])

    assert compile_regions(Listed()) == ["layers.0.norm"]
    blocks = Ffns()
    attach(blocks, MocteConfig.from_dict({"modules": "mlps.*", "num_experts": 2, "router": {"kind": "token"}}))
    assert compile_regions(blocks) == ["mlps.0.dense", "mlps.1.dense"]
    with pytest.raises(ConfigError, match="Flat keeps its layers in no nn.ModuleList"):
        compile_regions(Flat())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3"),
        ({"zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size"),
    ],
)
def test_what_it_does_not_go_with_is_refused(settings: dict[str, Any], named: str) -> None:
    run = read_run("quickstart", ["training.compile=true"])
    assert run.training.compile
    with pytest.raises(ConfigError, match=f"training.compile does not work with deepspeed.{named}"):
        RunConfig(
            model=run.model,
            data=run.data,
            training=run.training,
            evaluation=run.evaluation,
            deepspeed={**run.deepspeed, **settings},
        )
