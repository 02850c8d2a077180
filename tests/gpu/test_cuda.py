"""On a CUDA device: the same numbers as on the CPU, and tensors that stay where they belong."""

import pytest
import torch

from mocte_ds.config import MocteConfig
from mocte_ds.controller.gradients import read_conflict
from mocte_ds.controller.probe import ProbeSet
from mocte_ds.controller.run_state import RunState
from mocte_ds.dist.mesh import ALONE, mesh_of_processes
from mocte_ds.moe import BlockMode, attach
from mocte_ds.spectrum import sampled_svd, split_half_angles
from mocte_ds.spectrum.sample import Reservoir
from mocte_ds.trainability import lambda_max
from tests.moe.random_keys import randomise_key
from tests.small_models import small_llama

MESH = mesh_of_processes()

pytestmark = pytest.mark.gpu


def test_spectrum_is_that_of_the_cpu() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2000, 16) @ torch.randn(3, 16, 256) + torch.randn(3, 1, 256) + 0.1 * torch.randn(3, 2000, 256)
    here, there = sampled_svd(x, 8, ALONE), sampled_svd(x.cuda(), 8, ALONE)
    assert there.basis.is_cuda
    torch.testing.assert_close(there.singular_values.cpu(), here.singular_values, rtol=1e-3, atol=0)
    overlap = torch.linalg.svdvals(there.directions.cpu().mT @ here.directions)
    assert overlap.min() > 0.9999
    warm = sampled_svd(x.cuda(), 8, ALONE, basis=there.basis)
    torch.testing.assert_close(warm.singular_values, there.singular_values, rtol=1e-3, atol=0)
    torch.testing.assert_close(
        split_half_angles(x.cuda(), 8, ALONE).cpu(),
        split_half_angles(x, 8, ALONE),
        rtol=1e-2,
        atol=1e-3,
    )


def test_trainability_is_that_of_the_cpu() -> None:
    torch.manual_seed(0)
    expert = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
    rows = torch.randn(40, 32)
    assert lambda_max(expert.cuda(), rows.cuda()) == pytest.approx(lambda_max(expert.cpu(), rows), rel=1e-3)


def test_the_reservoir_keeps_the_same_rows() -> None:
    rows, keys = torch.randn(500, 4), torch.arange(500)
    here, there = Reservoir(50, 4, 1), Reservoir(50, 4, 1)
    here.add(rows, keys)
    for part in (slice(0, 200), slice(200, 500)):
        there.add(rows[part].cuda(), keys[part].cuda())
    assert there.rows().is_cuda and torch.equal(there.rows().cpu(), here.rows())


@pytest.mark.parametrize(
    "kind", ["token", "prefix", "document", "type", "pair", "previous", "hash", "pair-hash", "random"]
)
def test_blocks_route_and_conflict_is_that_of_the_cpu(kind: str) -> None:
    torch.manual_seed(0)
    made = small_llama(40, 16, 24, positions=12)
    config = MocteConfig.from_dict(
        {"modules": "model.layers.*.mlp", "num_experts": 4, "eod_id": 0, "router": {"kind": kind}}
    )
    blocks = attach(made, config)
    for block in blocks:
        randomise_key(block.banks[0].gate.key)
        for parameter in block.banks.parameters():
            parameter.requires_grad_(True)
        block.mode = BlockMode.SPECIALISING
    ids = torch.randint(0, 40, (6, 12))
    run = RunState(config, blocks, None, mesh=MESH, total_steps=10)
    found, outputs = [], []
    for device in ("cpu", "cuda"):
        run.module = made.to(device).eval()
        outputs.append(made(input_ids=ids.to(device)).logits.float().cpu().detach())
        probe = ProbeSet(10**6, 0, MESH)
        probe.give(ids, torch.arange(6) % 2)
        found.append(read_conflict(run, probe))
        reading = probe.read(made, blocks, torch.device(device))
        assert reading is not None and sum(route.numel() for route in reading.routes.values()) == 2 * ids.numel()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-4)
    for block, experts in found[0].items():
        for k, numbers in experts.items():
            assert found[1][block][k] == pytest.approx(numbers, rel=2e-2, abs=2e-3)
