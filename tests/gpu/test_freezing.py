"""On a CUDA device with NCCL: freezing against plain PyTorch, fused kernels, offload, and a bitwise resume."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.spawn import spawn
from tests.zero.against import check_master, check_ranks
from tests.zero.small_run import Case, replay, run_distributed, run_reference
from tests.zero.test_resume import FOLLOWING, STOPS, resumed, whole

pytestmark = pytest.mark.gpu

# Streams of their own: with overlap_comm gradients are reduced beside the backward pass.
REPLAYS = [
    Case(1, 1, 2, 300, overlap=True, bf16=True, record=True),
    Case(1, 1, 1, 2000, overlap=True, bf16=True, schedule="torch", record=True),
    Case(1, 1, 2, 700, offload=True, bf16=True, overlap=True, record=True),
    Case(1, 1, 2, 700, optimizer="fused", bf16=True, record=True),
    Case(1, 1, 2, 700, optimizer="torch-fused", bf16=True, record=True),
    Case(1, 1, 1, 700, optimizer="cpu", offload=True, bf16=True, record=True),
]


def on_gpu(function: Any, *args: Any) -> Any:
    return spawn(function, 1, *args, timeout=200, deepspeed=True, device="cuda")[0]


@pytest.mark.parametrize("case", [Case(1, 1, 2, 300, overlap=True), Case(1, 1, 1, recompute="reentrant")], ids=str)
def test_trajectory_is_that_of_plain_pytorch(case: Case) -> None:
    result, expected = on_gpu(run_distributed, case), run_reference(case.schedule)
    check_ranks(result, result)
    torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(expected["losses"]), rtol=0, atol=1e-4)
    torch.testing.assert_close(result["norms"], expected["norms"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", REPLAYS, ids=str)
def test_optimizer_is_adamw_over_the_trainable_units(case: Case) -> None:
    if case.optimizer != "torch":
        from deepspeed.accelerator import get_accelerator

        name = "CPUAdamBuilder" if case.optimizer == "cpu" else "FusedAdamBuilder"
        try:
            get_accelerator().get_op_builder(name)().load(verbose=False)
        except Exception as error:  # the compiler is missing, or does not fit torch's CUDA
            pytest.skip(f"DeepSpeed cannot build {name} here: {str(error).splitlines()[:1]}")
    result = on_gpu(run_distributed, case)
    check_ranks(result, result)
    expected = replay(case, result["gradients"])
    torch.testing.assert_close(result["norms"], expected["norms"], rtol=1e-5, atol=1e-6)
    for name, master in result["masters"].items():
        # Kernels of another device: as with DeepSpeed's own on a CPU.
        check_master(master, expected["masters"][name], name, Case(bf16=True, optimizer="fused"))
        assert torch.equal(result["weights"][name], master.to(torch.bfloat16)), name


@pytest.mark.parametrize(
    "case", [Case(1, 1, 2, bf16=True, overlap=True, optimizer="torch-fused"), Case(1, 1, 1, offload=True)], ids=str
)
def test_resume_is_bitwise(case: Case, tmp_path: Path) -> None:
    expected, found = on_gpu(whole, case, str(tmp_path)), on_gpu(resumed, case, str(tmp_path))
    for stop, run in zip(STOPS, found, strict=True):
        assert run["losses"] == expected["losses"][stop : stop + FOLLOWING], f"resumed from step {stop}"
    for name, weight in expected["weights"].items():
        assert torch.equal(found[-1]["weights"][name], weight), name
