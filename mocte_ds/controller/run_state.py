"""What the parts of the controller share: the blocks, the engine's parts that they act on, and where the run stands."""

from collections.abc import Mapping
from typing import Any

import torch

from mocte_ds.config import MocteConfig
from mocte_ds.controller.decide import BlockStatus, RunStatus
from mocte_ds.controller.handles import BlockHandle
from mocte_ds.controller.samples import Samples
from mocte_ds.dist.mesh import Mesh
from mocte_ds.errors import MocteError
from mocte_ds.moe.block import Block, BlockMode, ExpertMode
from mocte_ds.zero import TRUNK, UnitOptimizer, UnitRegistry, dense_unit, expert_unit, router_unit


class RunState:
    """State of one run on this rank, handed to the functions of this folder."""

    module: torch.nn.Module
    optimizer: UnitOptimizer
    scheduler: Any = None

    def __init__(
        self, config: MocteConfig, blocks: list[Block], registry: UnitRegistry, mesh: Mesh, total_steps: int
    ) -> None:
        """See :class:`Controller`."""
        self.config, self.registry, self.mesh, self.total_steps = config, registry, mesh, total_steps
        self.blocks = [BlockHandle(i, block) for i, block in enumerate(blocks)]
        self.context = blocks[0].context
        self.samples = Samples(config, blocks, mesh.data)
        self.flops_of_lambda: dict[tuple[Any, ...], tuple[int, int]] = {}
        """By an expert's class and shapes, the FLOPs before the first product with its kernel and of a product."""
        self.frozen_layers = 0
        """Frozen layers of the front; the embeddings freeze with the first."""
        self.domain_names: list[str] = []
        self.step = 0
        """Optimizer steps that are done."""
        self.tokens = 0
        """Tokens of these steps, all ranks together; no padding."""
        self.sequences_per_step = 0
        """The global batch."""

    @property
    def share(self) -> float:
        """Share of the budget that is done."""
        return self.step / self.total_steps

    def block(self, index: int) -> BlockHandle:
        """The block of that number.

        Raises:
            MocteError: there is none.
        """
        if not 0 <= index < len(self.blocks):
            raise MocteError(f"there is no block {index}: the model has blocks 0 to {len(self.blocks) - 1}.")
        return self.blocks[index]

    def status(self, share: float, step: int) -> RunStatus:
        """The run as decisions see it.

        Args:
            share: share of the budget that was done at the measurements.
            step: optimizer step of the measurements.
        """
        front = self.registry.front
        blocks = [
            BlockStatus(
                handle.index,
                handle.name,
                handle.mode,
                handle.experts,
                handle.born_share,
                handle.streak,
                front.layer_of(handle.block) if front is not None else None,
            )
            for handle in self.blocks
        ]
        return RunStatus(blocks, share, step, self.share, front is not None, self.frozen_layers)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, the same on all ranks."""
        return {
            "config": self.config.to_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "total_steps": self.total_steps,
            "frozen_layers": self.frozen_layers,
            "blocks": [handle.state_dict() for handle in self.blocks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the partition must be rebuilt after it."""
        self.step, self.tokens, self.frozen_layers = state["step"], state["tokens"], state["frozen_layers"]
        for handle, saved in zip(self.blocks, state["blocks"], strict=True):
            handle.load_state_dict(saved)

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
        """Names of the units that have trained and no longer do, over all ranks."""
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
