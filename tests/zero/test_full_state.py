"""What deepspeed.utils.safe_get_full_* say of parameters that are born, frozen and thawed."""

from typing import Any

import torch

from tests.engine import runs
from tests.spawn import spawn


def look(stage: int, offload: bool) -> list[str]:
    """Compare with our own view after every change; what does not agree."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    import mocte_ds

    settings = runs.config(auto=False)
    settings["zero_optimization"] |= {"stage": stage, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}
    settings["optimizer"]["params"]["torch_adam"] = True
    settings["zero_force_ds_cpu_optimizer"] = False
    model = runs.model()
    engine, *_ = mocte_ds.initialize(model=model, config=settings)
    run, rank, wrong, done = engine.mocte, torch.distributed.get_rank(), [], 0

    def step() -> None:
        nonlocal done
        for turn in range(2):
            ids, _ = runs.batch(done, turn * 2 + rank)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        done += 1

    def compare(when: str, frozen: set[str], without_moments: set[str] = frozenset()) -> None:
        seen: dict[Any, dict[str, torch.Tensor]] = {}
        for unit in sorted({group["unit"] for group in engine.optimizer.optimizer.param_groups}):
            for parameter, values in engine.optimizer.unit_state(unit).items():
                seen[parameter] = values
        # All ranks look at the same units; experts by their local number.
        for name, parameter in model.named_parameters():
            expert = ".deepspeed_experts." in name
            kind = name.split("deepspeed_experts.")[1][0] if expert and "layers.0" in name else "other"
            if kind == "other" and expert or "layers.0.mlp.dense" in name:
                continue
            found = safe_get_full_fp32_param(parameter)
            if kind in frozen:
                wrong.extend([f"{when}: {name} is there"] if found is not None else [])
                moments = safe_get_full_optimizer_state(parameter, "exp_avg")
                wrong.extend([f"{when}: moments of {name} are there"] if moments is not None else [])
                continue
            if not torch.equal(found, seen[parameter]["master"]):
                wrong.append(f"{when}: {name}")
            if kind not in without_moments:
                moments = safe_get_full_optimizer_state(parameter, "exp_avg")
                if not torch.equal(moments, seen[parameter]["exp_avg"]):
                    wrong.append(f"{when}: moments of {name}")

    step()
    run.emerge(block=0)
    compare("born", set())
    step()
    compare("a step later", set())
    for expert in (0, 2):  # local number 0 on both ranks
        run.freeze(block=0, expert=expert)
    compare("frozen", {"0"})
    step()
    compare("frozen, a step later", {"0"})
    for expert in (0, 2):
        run.thaw(block=0, expert=expert)
    compare("thawed", set(), {"0"})
    step()
    compare("thawed, a step later", set())
    return wrong


def test_full_values_of_parameters_that_leave_and_enter() -> None:
    for stage, offload in ((1, False), (2, False), (2, True)):
        assert spawn(look, 2, stage, offload, timeout=120, deepspeed=True) == [[], []], (stage, offload)
