"""Draws of passes are undone, each generator by itself; what somebody else has drawn in between is not drawn again."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mocte_ds.checkpoints.random_states import Draws

GENERATORS = {
    "python": (random.seed, random.random),
    "numpy": (np.random.seed, np.random.rand),
    "torch": (torch.manual_seed, lambda: torch.rand(()).item()),
}


Numbers = tuple[Callable[[], float], list[float]]


@pytest.fixture(params=GENERATORS)
def numbers(request: pytest.FixtureRequest) -> Numbers:
    """What draws from one of the generators, and the numbers that come next."""
    seed, draw = GENERATORS[request.param]
    seed(5)
    found = [draw() for _ in range(8)]
    seed(5)
    return draw, found


def test_passes_alone_are_undone(numbers: Numbers) -> None:
    draw, expected = numbers
    draws = Draws()
    draw()
    for _ in range(3):
        with draws.within():
            draw()
    draws.undo()
    assert draw() == expected[1]


def test_passes_since_the_last_draw_of_somebody_else(numbers: Numbers) -> None:
    draw, expected = numbers
    draws = Draws()
    for _ in range(2):
        draw()
        for _ in range(2):
            with draws.within():
                draw()
    draws.undo()
    assert draw() == expected[4]


def test_passes_that_draw_nothing_change_nothing(numbers: Numbers) -> None:
    draw, expected = numbers
    draws = Draws()
    for _ in range(2):
        draw()
        with draws.within():
            pass
    draws.undo()
    assert draw() == expected[2]
    draw()
    draws.undo()
    assert draw() == expected[4]


def test_one_generator_does_not_hold_up_another() -> None:
    random.seed(5)
    torch.manual_seed(5)
    expected = [random.random() for _ in range(2)][1], torch.rand(3)
    random.seed(5)
    torch.manual_seed(5)
    draws = Draws()
    with draws.within():
        torch.rand(1)
    random.random()
    with draws.within():
        torch.rand(1)
    draws.undo()
    assert random.random() == expected[0] and torch.equal(torch.rand(3), expected[1])
