"""Calls that are not the engine's: each token that trains counts once, and what was interrupted leaves nothing."""

import copy

import pytest
import torch
from torch import Tensor, nn

from mocte_ds.moe.context import BatchContext
from mocte_ds.moe.observer import Observer

IDS = torch.zeros(2, 8, dtype=torch.long)


class Reader(nn.Module):
    """A block as far as the context is concerned."""

    def __init__(self, context: BatchContext) -> None:
        super().__init__()
        self.context, self.linear = context, nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        with self.context.block_runs(self, "reader") as (state, again):
            if not again:
                state.see_features(hidden.detach())
            return self.linear(hidden)


class Base(nn.Module):
    def __init__(self, context: BatchContext) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.first, self.second, self.third = Reader(context), Reader(context), Reader(context)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.third(self.second(self.first(self.embedding(input_ids))))


class Model(nn.Module):
    def __init__(self, context: BatchContext) -> None:
        super().__init__()
        self.model, self.head = Base(context), nn.Linear(4, 9)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.model(input_ids))


def made() -> tuple[Model, BatchContext]:
    context = BatchContext()
    model = Model(context)
    context.follow(model, ["model.first", "model.second", "model.third"])
    return model, context


def test_tokens_and_passes_of_every_way_of_calling() -> None:
    """Three blocks, 16 tokens a pass."""
    model, context = made()

    def counts() -> tuple[int, int]:
        result = int(context.step_tokens), context.step_passes
        context.step_tokens, context.step_passes = 0, 0
        assert not context._passes
        return result

    model(IDS)
    assert counts() == (16, 1)
    model(IDS), model(IDS)
    assert counts() == (32, 2), "a second call of the model is a second pass"
    model(IDS), model.model(IDS)
    assert counts() == (32, 2), "so is one of its base model"
    with torch.no_grad():
        model(IDS), model.model(IDS), model.model.first(torch.zeros(5, 4))
    model.model.first(torch.zeros(5, 4))
    assert counts() == (0, 0)
    model.eval()
    model(IDS), model.model(IDS)
    assert counts() == (0, 0)


def test_a_copied_model_tells_its_own_context() -> None:
    model, context = made()
    twin = copy.deepcopy(model)
    twin.model(IDS)
    assert int(context.step_tokens) == 0 and int(twin.model.first.context.step_tokens) == 16


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
@pytest.mark.parametrize("part", [False, True])
def test_an_interrupted_pass_leaves_nothing(error: type[BaseException], part: bool) -> None:
    model, context = made()
    abandoned = []

    class Watching(Observer):
        def abandoned(self) -> None:
            abandoned.append(True)

    def stop(*_: object) -> None:
        raise error

    hook = model.model.second.register_forward_pre_hook(stop)
    if not part:
        context.announce(observer=Watching())
    with pytest.raises(error):
        (model.model if part else model)(IDS)
    hook.remove()
    context.forget_interrupted()  # as the engine does before every pass
    assert not context._passes and context.current().ids is None and len(abandoned) == (not part)
    model(IDS)
    assert (int(context.step_tokens), context.step_passes) == (16, 1)
