"""What the forward passes leave for the next check: features of all blocks, rows of all experts, loads by source."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mocte_ds.config import MocteConfig
from mocte_ds.controller.collect import FeatureCollector, SampleStream
from mocte_ds.controller.expert_rows import ExpertRows
from mocte_ds.dist.mesh import Axis
from mocte_ds.moe.bank import ClusterMOELayer
from mocte_ds.moe.block import Block
from mocte_ds.moe.forward import ForwardState
from mocte_ds.moe.observer import Observer
from mocte_ds.registry import OFF


class Samples(Observer):
    """The current sample of this rank, taken of the passes that it is handed over with."""

    def __init__(self, config: MocteConfig, blocks: Sequence[Block], axis: Axis) -> None:
        """Empty.

        Args:
            config: the "mocte" block.
            blocks: the model's; each has a collector of its own.
            axis: the ranks that sample together.
        """
        spectrum = config.spectrum
        self.stream = SampleStream(
            spectrum.rows, spectrum.documents, config.seed, config.eod_id, axis, spectrum.doublings
        )
        self.collectors = [FeatureCollector(block.hidden_size, self.stream) for block in blocks]
        self._collector_of = dict(zip(blocks, self.collectors, strict=True))
        self._layers = [bank.deepspeed_moe for block in blocks for bank in block.banks]
        self.unread: set[Block] = set()
        """Blocks whose features the coming check does not read."""
        self.rows: dict[ClusterMOELayer, ExpertRows] = {}
        """Of each layer of experts, where a policy watches them."""
        if config.freeze.policy != OFF:
            freeze = config.freeze
            self.rows = {layer: ExpertRows(config.num_experts, freeze.rows, config.seed) for layer in self._layers}
        self.by_source: dict[ClusterMOELayer, Tensor] = {}
        """Of each layer (S, E) tokens of each source and expert; those without a known source are left out."""
        self._marked: dict[ClusterMOELayer, Tensor] = {}

    # ---- what passes tell ------------------------------------------------------------------------------------------

    def features(self, block: Block, hidden: Tensor, state: ForwardState) -> None:
        """Offer the features of a block to its collector, if the coming check reads them."""
        if block not in self.unread:
            self._collector_of[block].see(hidden, state)

    @torch.no_grad()
    def routed(self, layer: ClusterMOELayer, hidden: Tensor, index: Tensor, state: ForwardState) -> None:
        """Offer the rows of experts, and count their tokens by source."""
        if layer in self.rows:
            rows = hidden.reshape(-1, hidden.shape[-1])
            self.rows[layer].offer(rows, index, *state.places(hidden.shape, index.device))
        domain, sources, experts = state.domain, state.sources, len(layer.loads.total)
        if domain is None or not sources or len(index) % domain.numel():
            return
        source = domain.to(index.device).repeat_interleave(len(index) // domain.numel())[:, None].expand_as(index)
        known, counted = (source >= 0) & (source < sources), state.counted(hidden.shape)
        if counted is not None:
            known = known & counted.reshape(-1, 1).expand_as(index).to(index.device)
        cells = torch.bincount(source[known] * experts + index[known], minlength=sources * experts)
        table, before = cells.view(sources, experts), self.by_source.get(layer)
        if before is not None and before.shape == table.shape:
            table = table + before.to(table.device)
        self.by_source[layer] = table

    def abandoned(self) -> None:
        """Begin a new sample: only some of the blocks have seen the pass that ended."""
        self.clear()

    def mark(self) -> None:
        """Remember the sample before a step, for :meth:`take_back`."""
        self._marked = dict(self.by_source)
        self.stream.mark()
        for collector in self.collectors:
            collector.mark()
        for rows in self.rows.values():
            rows.mark()

    def take_back(self) -> None:
        """Forget what passes have told since :meth:`mark`."""
        self.by_source = dict(self._marked)
        self.stream.take_back()
        for collector in self.collectors:
            collector.take_back()
        for rows in self.rows.values():
            rows.take_back()

    # ---- what checks ask -------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Begin a new sample; what is marked stays marked.

        Rows are chosen by the smallest hashes, so that old ones would stay and show the features of old weights.
        """
        self.stream.clear()
        for collector in self.collectors:
            collector.clear()
        for rows in self.rows.values():
            rows.clear()
        self.by_source = {}

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors of this rank."""
        return {
            "stream": self.stream.state_dict(),
            "collectors": [collector.state_dict() for collector in self.collectors],
            "banks": [
                {
                    "rows": self.rows[layer].state_dict() if layer in self.rows else None,
                    "by_source": self.by_source[layer].cpu() if layer in self.by_source else None,
                }
                for layer in self._layers
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what :meth:`state_dict` returned; rows go to ``device``."""
        self.stream.load_state_dict(state["stream"])
        for collector, values in zip(self.collectors, state["collectors"], strict=True):
            collector.load_state_dict(values)
        self.by_source = {}
        for layer, values in zip(self._layers, state["banks"], strict=True):
            if layer in self.rows and isinstance(values["rows"], dict):
                self.rows[layer].load_state_dict(values["rows"], device)
            if values["by_source"] is not None:
                self.by_source[layer] = values["by_source"]
