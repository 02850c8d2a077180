"""A model that checks could not call is refused at the first step; one that needs labels gets them."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mocte_ds.config import MocteConfig
from mocte_ds.controller.probe import ProbeSet
from mocte_ds.controller.probe_trial import needs_labels, require_callable
from mocte_ds.dist.mesh import mesh_of_processes
from mocte_ds.errors import MocteError
from mocte_ds.moe import Block, attach
from tests.small_models import loss_of, small_llama
from tests.spawn import spawn

MESH = mesh_of_processes()

V, T = 40, 12
IDS = torch.randint(1, V, (8, T), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


class WithLabels(nn.Module):
    """Gives a loss and no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_llama(V, 16, 24, 1, positions=T)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        self.seen.append(tuple(labels.shape))
        return loss_of(self.body, input_ids, labels)


class LabelsInSecret(WithLabels):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids, labels)


def made(model: nn.Module) -> tuple[nn.Module, list[Block]]:
    return model, attach(model, MocteConfig.from_dict({"modules": "body.model.layers.*.mlp", "num_experts": 4}))


def collected(model: nn.Module) -> ProbeSet:
    probe = ProbeSet(3 * T, None, MESH)
    probe.needs_labels = needs_labels(model)
    probe.offer((), {"input_ids": IDS, "labels": IDS}, 0, len(IDS))
    probe.finish()
    return probe


def test_a_model_that_needs_labels_gets_them() -> None:
    model, blocks = made(WithLabels())
    probe = collected(model)
    require_callable(probe, model, blocks, CPU, MESH)
    assert model.seen == [(1, T)], "one sequence is enough"
    reading = probe.read(model, blocks, CPU)
    assert reading.losses is None and model.seen[-1] == (3, T)
    given = ProbeSet(3 * T, None, MESH)
    given.needs_labels = True
    given.give(IDS, None)
    assert given.read(model, blocks, CPU) is not None


def test_a_model_that_cannot_be_called_is_refused() -> None:
    model, blocks = made(LabelsInSecret())
    with pytest.raises(MocteError, match="with input_ids of some sequences, and it fails: .*declare `labels`"):
        require_callable(collected(model), model, blocks, CPU, MESH)
    assert model.training


def test_what_needs_labels() -> None:
    assert needs_labels(WithLabels())
    assert not needs_labels(LabelsInSecret()) and not needs_labels(nn.Linear(1, 1))
    require_callable(ProbeSet(T, None, MESH), *made(WithLabels()), CPU, MESH)  # nothing was collected: nothing is tried


class FussyRank(WithLabels):
    """Fails with the token ids of one rank."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        if not self.training and int(input_ids[0, 0]) == 0:
            raise ValueError("a text begins with 0")
        return super().forward(input_ids, labels)


def _refusal() -> str:
    model, blocks = made(FussyRank())
    mesh = mesh_of_processes()
    probe = ProbeSet(3 * T, None, mesh)
    probe.needs_labels = True
    ids = IDS.clone()
    ids[:, 0] = 0 if dist.get_rank() == 1 else 1
    probe.offer((), {"input_ids": ids, "labels": ids}, 0, len(ids))
    probe.finish()
    with pytest.raises(MocteError) as caught:
        require_callable(probe, model, blocks, CPU, mesh)
    return str(caught.value)


def test_a_failure_on_one_rank_ends_all() -> None:
    first, second = spawn(_refusal, 2)
    assert first == second and "fails on rank 1: ValueError: a text begins with 0" in first
