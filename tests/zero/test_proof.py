"""What the steps after a change prove: each violation stops every rank and is named; and so does a plan of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mocte_ds.controller.proof import checksum
from mocte_ds.errors import Disagreement, MocteError
from tests.spawn import spawn
from tests.zero.small_run import EXPERTS, Case, Net, config, gate_weight, global_step

FROZEN, LIVE = "layers.0.1", "layers.0.3"


def start() -> Any:
    """A run on two ranks with two experts each, some steps after its emergence."""
    import mocte_ds

    torch.manual_seed(0)
    engine, *_ = mocte_ds.initialize(model=Net(), config=config(Case(ep=2)))
    global_step(engine, 0)
    engine.mocte.emerge(0)
    engine.mocte.blocks[0].block.banks[0].gate.key.set(gate_weight(0), torch.zeros(EXPERTS))
    for step in range(1, 4):
        global_step(engine, step)
    return engine


def write_to_frozen(engine: Any) -> None:
    if torch.distributed.get_rank() == 0:
        engine.mocte.run.registry.units[FROZEN].parameters[0].data[0, 0] += 1e-3


def undo_steps_of_live(engine: Any) -> None:
    if torch.distributed.get_rank() == 0:
        return
    step, optimizer = engine.optimizer.step, engine.optimizer

    def undone(*args: Any) -> None:
        before = [master.clone() for master in optimizer.masters()[LIVE]]
        step(*args)
        for master, old in zip(optimizer.masters()[LIVE], before, strict=True):
            master.copy_(old)

    optimizer.step = undone


def cut_the_graph(engine: Any) -> None:
    engine.module.inlet.register_forward_hook(lambda _module, _inputs, output: output.detach())


def run(harm: Callable[[Any], None] | None) -> list[str]:
    """Freeze, do harm, go on; what each step said."""
    engine, said = start(), []
    engine.mocte.freeze(0, 1)
    if harm:
        harm(engine)
    for step in range(4, 8):
        try:
            global_step(engine, step)
            said.append("fine")
        except MocteError as error:
            said.append(str(error))
            break
    return said


@pytest.mark.parametrize(
    ("harm", "steps", "problem"),
    [
        (None, 4, "fine"),
        (write_to_frozen, 1, r"after step 5, on rank 0: the frozen unit layers\.0\.1 moved"),
        (undo_steps_of_live, 2, r"after step 6, on rank 1: layers\.0\.3 trains and had a gradient, but 2 steps"),
        (cut_the_graph, 2, r"on rank 0: trunk trains, had a gradient before the last change .* and has none now"),
    ],
    ids=["none", "frozen", "stuck", "no-gradient"],
)
def test_the_next_steps_prove_what_a_freeze_did(harm: Any, steps: int, problem: str) -> None:
    for said in spawn(run, 2, harm, timeout=60, deepspeed=True):
        assert len(said) == steps and said[:-1] == ["fine"] * (steps - 1)
        with pytest.raises(AssertionError, match=problem):
            raise AssertionError(said[-1])


def freeze_different_experts() -> tuple[str, int, int]:
    engine = start()
    before = engine.mocte.optimizer_bytes()
    with pytest.raises(Disagreement) as caught:
        engine.mocte.freeze(0, torch.distributed.get_rank())
    return str(caught.value), before, engine.mocte.optimizer_bytes()


def test_ranks_with_plans_of_their_own_stop() -> None:
    for said, before, after in spawn(freeze_different_experts, 2, timeout=60, deepspeed=True):
        assert "the ranks disagree on plan of changes after step 4" in said
        assert "expert=0" in said and "expert=1" in said and before == after


def test_checksum() -> None:
    weights = torch.randn(3000, 1500)  # more than one chunk
    swapped = weights.clone()
    swapped[0, 0], swapped[-1, -1] = weights[-1, -1], weights[0, 0]
    negative_zero = torch.zeros(4).neg()
    assert torch.equal(checksum([weights]), checksum([weights.clone()]))
    assert not torch.equal(checksum([weights]), checksum([swapped]))
    assert not torch.equal(checksum([torch.zeros(4)]), checksum([negative_zero]))
    words = weights.view(torch.int32).reshape(-1).tolist()
    assert checksum([weights]).tolist() == [sum(words), sum(w * (i % 65521 + 1) for i, w in enumerate(words))]
