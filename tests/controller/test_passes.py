"""Places of forward passes in an optimizer step, as they are counted."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from mocte_ds.controller.passes import Passes
from mocte_ds.dist.mesh import Axis, mesh_of_processes
from mocte_ds.moe.forward import BEYOND, sequence_numbers


def begin(passes: Passes, texts: int = 4) -> list[int]:
    """Numbers of the sequences of a pass of rank 1 of 2 with micro-batches of 4."""
    return sequence_numbers(passes.begin(4, texts), 4, texts).tolist()


def made() -> Passes:
    run: Any = SimpleNamespace(blocks=[], mesh=replace(mesh_of_processes(), data=Axis(None, 1, 2)))
    return Passes(run)


def test_a_backward_pass_ends_a_micro_batch() -> None:
    passes = made()
    assert begin(passes) == [4, 5, 6, 7]
    passes.after_backward()
    passes.after_backward()  # of the engine, and of each parameter
    assert begin(passes) == [12, 13, 14, 15]


def test_texts_of_the_same_samples_in_one_call_or_several() -> None:
    both = [4, 5, 6, 7, *(number + BEYOND for number in (4, 5, 6, 7))]
    third = [number + 2 * BEYOND for number in (4, 5, 6, 7)]
    one, several = made(), made()
    assert begin(one, 8) == both == begin(several) + begin(several)
    assert begin(one) == third == begin(several)
    for passes in (one, several):
        passes.after_backward()
        assert begin(passes) == [12, 13, 14, 15]
