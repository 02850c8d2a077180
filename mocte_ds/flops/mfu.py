"""Model FLOPs utilisation (MFU): which share of what the devices could compute in a step went into the model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from mocte_ds.config import MocteConfig
from mocte_ds.errors import ConfigError, MocteError
from mocte_ds.flops.ledger import Ledger
from mocte_ds.flops.model_sizes import ModelSizes, layer_stack, model_sizes
from mocte_ds.moe.attach import matching_modules

PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
"""FLOPs per second of dense products in bf16 and fp16, by the name that the driver gives a device.

From NVIDIA's data sheets of A100, H100 SXM and H200 SXM, whose larger numbers are for sparse matrices. Other forms of a
chip have other names and other peaks.
"""


class Utilisation:
    """MFU of one optimizer step after another.

    MFU = (forward + dgrad + wgrad + routing) / (seconds x devices x peak): the FLOPs by :class:`Ledger` of what the
    model itself needs for the step's tokens (arXiv 2204.02311, appendix B), over what all devices could compute in the
    time of the step. Weight gradients that frozen experts do not need are not counted, nor is what is computed twice
    (activation checkpointing), nor what checks compute; their time is.
    """

    def __init__(self, sizes: ModelSizes, config: MocteConfig | None, devices: int, peak: float) -> None:
        """For one run.

        Args:
            sizes: of the dense model.
            config: the "mocte" block, None for a dense run.
            devices: of all ranks.
            peak: FLOPs per second of one of them.
        """
        self._sizes, self._config, self._full_rate = sizes, config, devices * peak

    def of_step(
        self,
        tokens: int,
        context: float,
        blocks: Sequence[dict[str, Any]],
        frozen_layers: int,
        seconds: float,
    ) -> float:
        """Of one optimizer step, as a share of one.

        Args:
            tokens: of the global batch.
            context: tokens of a sequence, on average.
            blocks: as of :meth:`Ledger.step`.
            frozen_layers: of the front.
            seconds: that the step took, without validation and saves.
        """
        ledger = Ledger()
        ledger.step(self._sizes, tokens, context, self._config, blocks, frozen_layers)
        return ledger.model / (seconds * self._full_rate)


def utilisation_of(
    model: nn.Module, config: MocteConfig, devices: int, settings: Mapping[str, Any]
) -> Utilisation | None:
    """For a model of a user's own script, before blocks are put into it; None where something is not known.

    Args:
        model: any.
        config: the "mocte" block.
        devices: of all ranks.
        settings: the DeepSpeed config.

    Raises:
        ConfigError: the block gives the peak, and the FLOPs of the model cannot be counted.
    """
    peak = device_peak(config.peak_tflops, settings)
    if peak is None:
        return None
    names = matching_modules(model, config.modules)
    try:
        sizes, inside = model_sizes(model, names), {id(part) for part in layer_stack(model).modules()}
        if outside := [name for name in names if id(model.get_submodule(name)) not in inside]:
            raise MocteError(f"{outside[0]} does not lie in the largest nn.ModuleList of {type(model).__name__}.")
    except MocteError as error:
        if config.peak_tflops is None:
            return None
        raise ConfigError(f"mocte.peak_tflops = {config.peak_tflops}: {error} Remove the key.") from error
    return Utilisation(sizes, config, devices, peak)


def device_peak(given: float | None, settings: Mapping[str, Any]) -> float | None:
    """FLOPs per second that one device reaches at most; None where that is not known.

    Args:
        given: TFLOP/s by the user's setting `peak_tflops`, which wins.
        settings: the DeepSpeed config: :data:`PEAKS` are those of bf16 and fp16.
    """
    if given is not None:
        return given * 1e12
    half = any((settings.get(kind) or {}).get("enabled") for kind in ("bf16", "fp16", "torch_autocast"))
    if not half or get_accelerator().device_name() != "cuda":
        return None
    return PEAKS.get(torch.cuda.get_device_name())
