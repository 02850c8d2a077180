"""What the parts of a check share: the blocks, the engine's pieces they act on, and where the run stands."""

from typing import Any

import torch

from mocte_ds.config import MocteConfig
from mocte_ds.controller.handles import BlockHandle
from mocte_ds.moe.block import Block, BlockMode, ExpertMode
from mocte_ds.spectrum.collect import FeatureCollector, SampleStream
from mocte_ds.zero import TRUNK, UnitOptimizer, UnitRegistry, dense_unit, expert_unit, router_unit


class RunState:
    """State of one run on this rank; the controller is one, and hands itself to the functions of this folder."""

    module: torch.nn.Module
    optimizer: UnitOptimizer
    scheduler: Any = None

    def __init__(
        self, config: MocteConfig, blocks: list[Block], registry: UnitRegistry, ep_rank: int, total_steps: int
    ) -> None:
        """See :class:`Controller`."""
        self.config, self.registry, self.ep_rank, self.total_steps = config, registry, ep_rank, total_steps
        self.blocks = [BlockHandle(i, block) for i, block in enumerate(blocks)]
        self.context = blocks[0].context
        s = config.spectrum
        self.stream = SampleStream(s.rows, s.documents, config.seed, config.eod_id, s.doublings)
        self.collectors = [FeatureCollector(block.hidden_size, self.stream) for block in blocks]
        self.frozen_layers = 0
        """Layers of the front that are frozen, the embeddings with the first."""
        self.domain_names: list[str] = []
        self.step = 0
        self.tokens = 0

    @property
    def share(self) -> float:
        """Part of the budget that is done."""
        return self.step / self.total_steps

    def experts_that(self, mode: ExpertMode) -> set[str]:
        """Names of the units of all experts in a mode, over all ranks."""
        return {
            expert_unit(handle.block, k)
            for handle in self.blocks
            for k, expert in enumerate(handle.experts)
            if expert.mode is mode
        }

    def in_frozen_front(self, handle: BlockHandle) -> bool:
        """Whether a block lies in a layer of the front that is frozen."""
        layer = self.registry.front.layer_of(handle.block) if self.registry.front is not None else None
        return layer is not None and layer < self.frozen_layers

    def frozen_units(self) -> set[str]:
        """Names of the units that have trained and do so no more, over all ranks."""
        units = self.experts_that(ExpertMode.FROZEN)
        if self.registry.front is not None:
            units.update(set(self.registry.front.units()) - set(self.registry.front.units(self.frozen_layers)))
        for handle in self.blocks:
            if handle.block.kind == "lora" and self.in_frozen_front(handle):
                units.add(dense_unit(handle.block))
            if handle.mode is BlockMode.LOCKED and router_unit(handle.block) in self.registry.units:
                units.add(router_unit(handle.block))
        return units

    def trainable_units(self) -> set[str]:
        """Names of the units that train, over all ranks."""
        units = {TRUNK} | self.experts_that(ExpertMode.TRAINING)
        if self.registry.front is not None:
            units.update(self.registry.front.units(self.frozen_layers))
        for handle in self.blocks:
            if (handle.mode is BlockMode.WARMUP or handle.block.kind == "lora") and not self.in_frozen_front(handle):
                units.add(dense_unit(handle.block))
            if handle.mode is BlockMode.SPECIALISING and router_unit(handle.block) in self.registry.units:
                units.add(router_unit(handle.block))
        return units
