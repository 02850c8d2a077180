"""What the forward passes leave for the next check: sampled features of all blocks, and rows of all experts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mocte_ds.config import MocteConfig
from mocte_ds.controller.collect import FeatureCollector, SampleStream
from mocte_ds.dist.mesh import Axis
from mocte_ds.moe.block import Block


class Samples:
    """The current sample of this rank."""

    def __init__(self, config: MocteConfig, blocks: Sequence[Block], axis: Axis) -> None:
        """Empty.

        Args:
            config: the "mocte" block.
            blocks: the model's; every block offers its features to its own collector.
            axis: the ranks that sample together.
        """
        spectrum = config.spectrum
        self.stream = SampleStream(
            spectrum.rows, spectrum.documents, config.seed, config.eod_id, axis, spectrum.doublings
        )
        self.collectors = [FeatureCollector(block.hidden_size, self.stream) for block in blocks]
        self._banks = [bank.deepspeed_moe for block in blocks for bank in block.banks]

    def clear(self) -> None:
        """Begin a new sample.

        Rows are chosen by the smallest hashes, so that old ones would stay and show the features of old weights.
        """
        self.stream.clear()
        for collector in self.collectors:
            collector.clear()
        for bank in self._banks:
            bank.clear_samples()

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors of this rank."""
        return {
            "stream": self.stream.state_dict(),
            "collectors": [collector.state_dict() for collector in self.collectors],
            "banks": [
                {"rows": bank.expert_rows and bank.expert_rows.state_dict(), "by_source": bank.by_source}
                for bank in self._banks
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what :meth:`state_dict` returned; rows go to ``device``."""
        self.stream.load_state_dict(state["stream"])
        for collector, values in zip(self.collectors, state["collectors"], strict=True):
            collector.load_state_dict(values)
        for bank, values in zip(self._banks, state["banks"], strict=True):
            if bank.expert_rows is not None and isinstance(values["rows"], dict):
                bank.expert_rows.load_state_dict(values["rows"], device)
            bank.by_source = values["by_source"]
