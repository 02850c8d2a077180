"""Emergence, freezing and thawing in the ZeRO partition against plain PyTorch, in real processes."""

import functools

import pytest
import torch

from tests.spawn import spawn
from tests.zero.small_run import EXPERTS, HIDDEN, PLAN, STEPS, WIDTH, run_distributed, run_reference

EXPERT_PARAMETERS = 3 * HIDDEN * WIDTH + WIDTH
TRUNK_PARAMETERS = HIDDEN * HIDDEN + HIDDEN


@functools.cache
def reference() -> dict:
    return run_reference()


@pytest.mark.parametrize(
    ("world", "ep", "stage", "overlap"),
    [(2, 1, 1, False), (2, 2, 2, False), (2, 2, 1, True), (4, 2, 2, True), (4, 4, 1, False)],
)
def test_trajectory_is_that_of_an_optimizer_without_the_frozen_units(world, ep, stage, overlap):
    results = spawn(run_distributed, world, {"stage": stage, "ep": ep, "overlap": overlap}, timeout=200, deepspeed=True)
    expected = reference()
    losses = torch.tensor([result["losses"] for result in results]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(expected["losses"]), rtol=2e-5, atol=1e-6)
    for result in results:
        torch.testing.assert_close(result["norms"], results[0]["norms"], rtol=0, atol=0)
        torch.testing.assert_close(result["norms"], expected["norms"], rtol=1e-4, atol=1e-6)
        for name, weight in result["weights"].items():
            if name in expected["weights"]:
                torch.testing.assert_close(weight, expected["weights"][name], rtol=1e-5, atol=2e-6, msg=name)
    assert results[0]["modes"] == [
        ["frozen", "training", "frozen", "frozen"],
        ["training", "training", "frozen", "training"],
    ]


def test_bytes_are_those_of_the_trainable_parameters():
    results = spawn(run_distributed, 2, {"stage": 2, "ep": 2}, timeout=200, deepspeed=True)
    scalar_steps = 4  # torch's AdamW keeps one fp32 step a group
    for rank, result in enumerate(results):
        modes = {(block, k): "dormant" for block in range(2) for k in range(EXPERTS)}
        dense = {0, 1}
        for step in range(STEPS):
            for action, block, *rest in PLAN.get(step, []):
                if action == "emerge":
                    dense.discard(block)
                    modes.update({(block, k): "training" for k in range(EXPERTS)})
                else:
                    modes[block, rest[0]] = "frozen" if action == "freeze" else "training"
            local = [key for key, mode in modes.items() if mode == "training" and key[1] // 2 == rank]
            shared = (TRUNK_PARAMETERS + len(dense) * EXPERT_PARAMETERS) // 2
            groups = 2 + 2 * len(dense) + 2 * len(local)
            assert result["bytes"][step] == 12 * (shared + len(local) * EXPERT_PARAMETERS) + scalar_steps * groups
