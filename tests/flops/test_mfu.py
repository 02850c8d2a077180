"""Model FLOPs utilisation against numbers worked out by hand; where it is not known there is none."""

from typing import Any

import pytest
import torch
from torch import nn

from mocte_ds.config import MocteConfig
from mocte_ds.errors import ConfigError
from mocte_ds.flops import mfu
from mocte_ds.flops.mfu import Utilisation, device_peak, utilisation_of
from mocte_ds.flops.model_sizes import model_sizes
from tests.engine import runs

FFN = 3 * 32 * 48
MATRICES = 2 * (4 * 32 * 32 + FFN) + 32 * runs.VOCAB
"""Of tests.engine.runs.model(): two layers of four matrices of attention and an FFN, and the output matrix."""
TOKENS, CONTEXT, SECONDS, DEVICES, PEAK = 768, 48, 0.5, 4, 2e9
DENSE = TOKENS * (6 * MATRICES + 12 * CONTEXT * 32 * 2)
"""A multiply-add is two FLOPs, and is done forwards and twice backwards; so too the scores and the mean of values."""
BF16: dict[str, Any] = {"bf16": {"enabled": True}}


def config(**more: Any) -> MocteConfig:
    return MocteConfig(modules="model.layers.*.mlp", **more)


def blocks(mode: str, frozen: int) -> list[dict[str, Any]]:
    experts = ["frozen"] * frozen + ["training"] * (4 - frozen)
    return [{"layer": 0, "mode": mode, "experts": experts, "load": [100, 200, 300, 168]}]


def test_by_hand() -> None:
    assert DENSE == 117_964_800
    model = runs.model()
    of = Utilisation(model_sizes(model, ["model.layers.0.mlp", "model.layers.1.mlp"]), config(), DEVICES, PEAK).of_step
    available = SECONDS * DEVICES * PEAK
    assert of(TOKENS, CONTEXT, [], 0, SECONDS) == pytest.approx(DENSE / available, rel=1e-12) == 0.0294912
    assert of(TOKENS, CONTEXT, blocks("warmup", 0), 0, SECONDS) == pytest.approx(DENSE / available, rel=1e-12)
    # Two frozen experts have 300 tokens of which no weight gradients are made; everything else stays.
    lost = of(TOKENS, CONTEXT, blocks("specialising", 0), 0, SECONDS) - of(
        TOKENS, CONTEXT, blocks("specialising", 2), 0, SECONDS
    )
    assert lost == pytest.approx(300 * 2 * FFN / available, rel=1e-9)
    # Layers that run again do so for the memory's sake.
    model.gradient_checkpointing_enable()
    again = Utilisation(model_sizes(model, ["model.layers.0.mlp"]), config(), DEVICES, PEAK).of_step
    assert again(TOKENS, CONTEXT, [], 0, SECONDS) == pytest.approx(DENSE / available, rel=1e-12)


def test_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_peak(None, BF16) is None, "a CPU has no peak"
    assert device_peak(0.25, {}) == 0.25e12, "a peak of the user's own is taken anywhere"

    class Cuda:
        def device_name(self) -> str:
            return "cuda"

    monkeypatch.setattr(mfu, "get_accelerator", Cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert device_peak(None, BF16) == 989e12 and device_peak(100, BF16) == 1e14
    assert device_peak(None, {"bf16": {"enabled": False}}) is None, "the peaks are those of bf16 and fp16"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 PCIe")
    assert device_peak(None, BF16) is None, "another form of a chip has another peak"


def test_a_model_that_cannot_be_counted() -> None:
    """Its lines have no MFU; a user who gave the peak is told why."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
    assert utilisation_of(model, MocteConfig(modules="0"), 1, BF16) is None
    with pytest.raises(ConfigError, match=r"mocte.peak_tflops = 1.0: Sequential has no nn.ModuleList.*Remove the key"):
        utilisation_of(model, MocteConfig(modules="0", peak_tflops=1.0), 1, BF16)
    llama = runs.model()
    llama.add_module("beside", nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)))
    with pytest.raises(ConfigError, match="beside does not lie in the largest nn.ModuleList of LlamaForCausalLM"):
        utilisation_of(llama, MocteConfig(modules=["beside", "model.layers.*.mlp"], peak_tflops=1.0), 1, BF16)
    found = utilisation_of(runs.model(), config(peak_tflops=0.002), DEVICES, {})
    assert found is not None and found.of_step(TOKENS, CONTEXT, [], 0, SECONDS) == 0.0294912
