"""Gradients of many micro-batches in bf16, against the same gradients added up in fp32 by hand."""

from typing import Any

import torch

from tests.small_models import loss_of, small_llama
from tests.spawn import spawn

TURNS, VOCAB = 16, 40


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return small_llama(VOCAB, layers=1, positions=16, initializer_range=0.1).bfloat16()


def batch(turn: int) -> torch.Tensor:
    return torch.randint(VOCAB, (1, 16), generator=torch.Generator().manual_seed(turn))


def summed_by_hand() -> dict[str, torch.Tensor]:
    model, sums = small_model(), {}
    for turn in range(TURNS):
        ids = batch(turn)
        loss_of(model, ids, ids.roll(-1, 1)).backward()
        for name, parameter in model.named_parameters():
            sums[name] = sums.get(name, 0.0) + parameter.grad.float() / TURNS
            parameter.grad = None
    return sums


def error_of(stage: int, fp32: bool, offload: bool) -> float:
    """Relative error of the gradient that an engine steps with."""
    from deepspeed.utils import safe_get_full_grad

    import mocte_ds

    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": TURNS,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "mocte": {"modules": "model.layers.*.mlp", "num_experts": 2, "auto": False, "total_steps": 10},
    }
    if offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if fp32:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = mocte_ds.initialize(model=small_model(), config=settings)
    expected, apart, whole = summed_by_hand(), 0.0, 0.0
    for turn in range(TURNS):
        ids = batch(turn)
        engine.backward(loss_of(engine, ids, ids.roll(-1, 1)))
        if turn == TURNS - 1:
            for name, parameter in engine.module.named_parameters():
                wanted = expected.get(name.replace(".mlp.dense.", ".mlp."))
                if wanted is not None:
                    found = safe_get_full_grad(parameter)
                    apart += float((found.float() - wanted).square().sum())
                    whole += float(wanted.square().sum())
        engine.step()
    assert whole > 0
    return (apart / whole) ** 0.5


def errors() -> dict[str, float]:
    cases = {"2": (2, True, False), "2 offloaded": (2, True, True), "3": (3, True, False), "bf16": (2, False, False)}
    return {name: error_of(*case) for name, case in cases.items()}


def test_micro_batches_are_added_up_in_fp32() -> None:
    found = spawn(errors, 1, timeout=240, deepspeed=True)[0]
    control = found.pop("bf16")
    assert all(error < 1e-6 for error in found.values()), found
    assert control > 1e-3, "without grad_accum_dtype they are rounded to bf16 again and again"


def gradients(turns: int, fp32: bool) -> dict[str, torch.Tensor]:
    """Mean gradients of the micro-batches by an engine that adds up ``turns`` of them, the rest in fp32 by hand.

    With experts, which are reduced apart; nothing moves, because the learning rate is 0.
    """
    from deepspeed.utils import safe_get_full_grad

    import mocte_ds

    block = {"modules": "model.layers.*.mlp", "num_experts": 4, "ep_size": 2, "router": {"kind": "hash"}}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": turns,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
        "bf16": {"enabled": True},
        "mocte": {**block, "auto": False, "total_steps": 100},
    }
    if fp32:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = mocte_ds.initialize(model=small_model(), config=settings)
    engine.mocte.emerge(0)
    rank, sums = torch.distributed.get_rank(), {}
    for turn in range(TURNS):
        ids = batch(2 * turn + rank)
        engine.backward(loss_of(engine, ids, ids.roll(-1, 1)))
        if (turn + 1) % turns == 0:
            for name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    found = safe_get_full_grad(parameter).float() * turns / TURNS
                    sums[name] = sums.get(name, 0.0) + found
        engine.step()
    engine.destroy()
    return sums


def errors_of_experts() -> dict[str, float]:
    expected = gradients(1, True)
    experts = [name for name in expected if "deepspeed_experts" in name]
    assert len(experts) == 2 * 3
    found = {fp32: gradients(TURNS, fp32) for fp32 in (True, False)}
    whole = sum(float(expected[name].square().sum()) for name in experts)
    return {
        str(fp32): (sum(float((sums[name] - expected[name]).square().sum()) for name in experts) / whole) ** 0.5
        for fp32, sums in found.items()
    }


def test_gradients_of_experts_are_added_up_in_fp32() -> None:
    for found in spawn(errors_of_experts, 2, timeout=240, deepspeed=True):
        assert found["True"] < 1e-6 and found["False"] > 1e-3, found
