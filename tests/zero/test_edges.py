"""What a user may do to a run around a change: roll back, call too early, freeze by hand, bring learning rates."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from mocte_ds.errors import ConfigError, MocteError
from tests.spawn import spawn
from tests.zero.small_run import EXPERTS, Case, Net, config, gate_weight, global_step


def start(groups: Any = None, scheduler: Any = None, model: Any = None, **mocte: Any) -> Any:
    import mocte_ds

    torch.manual_seed(0)
    settings = config(Case(1))
    settings["mocte"].update(mocte)
    net = model or Net()
    parameters = groups(net) if groups else None
    return mocte_ds.initialize(model=net, config=settings, model_parameters=parameters, lr_scheduler=scheduler)[0]


def emerge(engine: Any, block: int) -> None:
    engine.mocte.emerge(block)
    engine.mocte.blocks[block].block.banks[0].gate.key.set(gate_weight(block), torch.zeros(EXPERTS))


class WithOutlet(Net):
    """Something trains after the layers, and nothing below them."""

    def __init__(self) -> None:
        super().__init__()
        self.outlet = torch.nn.Parameter(torch.ones(16))
        self.inlet.requires_grad_(False)

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        x = self.inlet(features)
        for layer in self.layers:
            x = x + layer(x)
        return (x * self.outlet - target).square().mean()


def roll_back(folder: str) -> dict[str, Any]:
    """Save, freeze the front, go on; then load the checkpoint and take the same steps without the freeze."""
    engine = start(model=WithOutlet(), modules="layers.1", freeze={"prefix": {"layers": 1}})
    global_step(engine, 0)
    engine.save_checkpoint(folder, "before")
    expected = [global_step(engine, step) for step in range(1, 4)]
    engine.load_checkpoint(folder, "before")
    engine.mocte.freeze_prefix(1)
    frozen = [global_step(engine, step) for step in range(1, 4)]
    twin = copy.deepcopy(engine.module.layers[0])
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        still = float(twin(torch.ones(1, 16)).abs().max())
    engine.load_checkpoint(folder, "before")
    return {
        "expected": expected,
        "frozen": frozen,
        "again": [global_step(engine, s) for s in range(1, 4)],
        "twin": still,
    }


def test_a_checkpoint_of_before_the_freeze_lets_the_front_train_again(tmp_path: Path) -> None:
    (result,) = spawn(roll_back, 1, str(tmp_path), timeout=60, deepspeed=True)
    assert result["again"] == result["expected"] != result["frozen"]
    assert result["twin"] == 0.0, "a copy of a frozen layer runs with the weights of the original"


def call_in_the_middle() -> list[str]:
    engine, said = start(), []
    global_step(engine, 0)
    for turn in range(4):
        features = torch.randn(8, 16)
        engine.backward(engine(features=features, target=features))
        if turn in (0, 3):
            with pytest.raises(MocteError) as caught:
                engine.mocte.emerge(0)
            said.append(str(caught.value))
        engine.step()
    engine.mocte.emerge(0)
    return said


def test_changes_come_between_steps() -> None:
    (said,) = spawn(call_in_the_middle, 1, timeout=60, deepspeed=True)
    assert len(said) == 2 and all("between a backward pass and the optimizer's step" in text for text in said)


def with_a_fixed_matrix() -> dict[str, Any]:
    model = Net()
    for layer in model.layers:
        layer.up_proj.weight.requires_grad_(False)
    fixed = [layer.up_proj.weight.detach().clone() for layer in model.layers]
    engine = start(model=model)
    emerge(engine, 0)
    for step in range(3):
        global_step(engine, step)
    experts = engine.mocte.blocks[0].block.banks[0].local_experts
    dense = engine.mocte.blocks[1].block.dense
    return {
        "experts": all(torch.equal(expert.up_proj.weight, fixed[0]) for expert in experts),
        "train": any(not torch.equal(expert.down_proj.weight, experts[0].down_proj.weight) for expert in experts),
        "dense": torch.equal(dense.up_proj.weight, fixed[1]) and dense.up_proj.weight.grad is None,
    }


def test_what_the_user_froze_stays_frozen_in_the_experts() -> None:
    (result,) = spawn(with_a_fixed_matrix, 1, timeout=60, deepspeed=True)
    assert result == {"experts": True, "train": True, "dense": True}


def rates_of_the_newborn() -> list[dict[str, float]]:
    """A user's groups with rates of their own, and a scheduler that only knows the last rate."""

    def groups(net: Net) -> list[dict[str, Any]]:
        ffn = [p for layer in net.layers for p in layer.parameters()]
        return [{"params": list(net.inlet.parameters()), "lr": 1e-2}, {"params": ffn, "lr": 4e-3}]

    engine = start(groups, lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    rates = []
    for step in range(6):
        if step == 3:
            emerge(engine, 0)
            engine.mocte.freeze(0, 1)
        if step == 5:
            engine.mocte.thaw(0, 1)
        rates.append({g["unit"]: g["lr"] for g in engine.optimizer.optimizer.param_groups})
        global_step(engine, step)
    return rates


def test_newborn_and_thawed_units_are_where_the_schedule_is() -> None:
    (rates,) = spawn(rates_of_the_newborn, 1, timeout=60, deepspeed=True)
    for step, found in enumerate(rates):
        for unit, rate in found.items():
            assert rate == pytest.approx((1e-2 if unit == "trunk" else 4e-3) * 0.5**step), (step, unit)
    assert "layers.0.1" in rates[5] and "layers.0.1" not in rates[3]


def without_a_trunk() -> str:
    model = Net()
    model.inlet.requires_grad_(False)
    with pytest.raises(ConfigError) as caught:
        start(model=model)
    return str(caught.value)


def test_something_outside_of_the_blocks_must_train() -> None:
    assert "nothing outside of the blocks trains" in spawn(without_a_trunk, 1, timeout=60, deepspeed=True)[0]
