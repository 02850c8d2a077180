"""A trained run as families look at it: its base model, its blocks by layer, and what their routers have in common."""

import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from mocte_ds.base_model import make_config
from mocte_ds.checkpoints.source import Source
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block
from mocte_ds.moe.ffn_shape import ffn_shape
from mocte_ds.remote_code.experts_mocte import in_out
from mocte_ds.router_config import RouterConfig

# transformers' grouped matrix product wants rows of a multiple of 16 bytes; units of zeros fill them up.
UNITS = {"fp32": 4, "bf16": 8, "fp16": 8}


class Mixture:
    """A model with blocks, as families look at it."""

    def __init__(self, source: Source) -> None:
        """Look at it.

        Args:
            source: of the model.

        Raises:
            CheckpointError: a block stands elsewhere than for the FFN of a layer.
        """
        self.source, self.architecture = source, source.base["architecture"]
        self.config: Any = make_config(source.base, Path("the base model")).get_text_config()
        """Of the base model."""
        layers = getattr(getattr(source.model, "model", None), "layers", ())
        self.blocks = {i: layer.mlp for i, layer in enumerate(layers) if isinstance(getattr(layer, "mlp", None), Block)}
        """By the number of their layer."""
        strange = [block.name for block in source.blocks if block not in self.blocks.values()]
        if strange:
            raise CheckpointError(
                f"the block {strange[0]} is not the FFN of a layer (model.layers.N.mlp); no stock class has experts "
                "there."
            )
        self.count = len(layers)
        """Layers."""
        self.emerged = {i: block for i, block in self.blocks.items() if block in source.emerged}

    @property
    def some(self) -> Block:
        """One of the blocks that have emerged; they have one config."""
        return next(iter(self.emerged.values()))

    @property
    def router(self) -> RouterConfig:
        """Of all blocks."""
        return self.some.banks[0].gate.router

    @property
    def normalised(self) -> bool:
        """Whether the weights of a token's experts add up to 1."""
        return self.router.weight == "hard" or self.router.normalise

    @cached_property
    def width(self) -> int:
        """Hidden units f of an expert in the export, filled up to what transformers can compute.

        Raises:
            CheckpointError: blocks have experts of other widths.
        """
        shapes = [ffn_shape(block.banks[0].local_experts[0]) for block in self.emerged.values()]
        widths = sorted({shape.width for shape in shapes if shape})
        if len(widths) != 1:
            raise CheckpointError(f"stock classes have experts of one width, the run of {widths}; use --class own.")
        units = UNITS[self.source.dtype]
        return math.ceil(widths[0] / units) * units

    def ffn_width(self, layers: Iterable[int]) -> int:
        """Hidden units of the dense FFNs of some layers' blocks.

        Raises:
            CheckpointError: they differ.
        """
        widths = sorted({in_out(self.blocks[layer].dense.gate_proj)[1] for layer in layers})
        if len(widths) != 1:
            raise CheckpointError(f"stock classes have FFNs of one width, the run of {widths}; use --class own.")
        return widths[0]
