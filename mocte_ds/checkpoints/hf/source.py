"""What a trained model holds, layer by layer: the view of a checkpoint that every export starts from."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mocte_ds.config import MocteConfig
from mocte_ds.errors import CheckpointError
from mocte_ds.models.config import DecoderConfig

_FFN = re.compile(r"model\.layers\.(\d+)\.mlp\.(.+)")
_EXPERT = re.compile(r"banks\.(\d+)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.+)")
_GATE = re.compile(r"banks\.(\d+)\.deepspeed_moe\.gate\.(cluster_weight|cluster_bias|cluster_table)")


@dataclass
class LayerFFN:
    """The FFN of one transformer layer: dense, or a block whose experts have emerged."""

    name: str
    """Its path in the trained model."""
    dense: dict[str, Tensor] = field(default_factory=dict)
    """Matrices of the dense or shared FFN by name, e.g. `gate_proj.weight`."""
    experts: list[dict[str, Tensor]] = field(default_factory=list)
    """Matrices of each expert; empty where no experts run."""
    gate: dict[str, Tensor] = field(default_factory=dict)
    """`cluster_weight` (E, d) and `cluster_bias` (E,), or `cluster_table` (V,); empty where no experts run."""


class Source:
    """A trained decoder as tensors: embeddings, attention and norms by name, and one :class:`LayerFFN` a layer."""

    def __init__(self, state_dict: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Sort the tensors of a consolidated checkpoint.

        Args:
            state_dict: all tensors with all experts, by the names of mocte_ds.checkpoints.model.load_model.
            state: "model" (fields of DecoderConfig), "mocte" (the resolved block, or None) and "blocks" (name, mode).

        Raises:
            CheckpointError: an expert or matrix is missing, or there is a tensor that belongs nowhere.
        """
        self.state = dict(state)
        self.config = DecoderConfig(**state["model"])
        self.mocte = MocteConfig.from_dict(state["mocte"]) if state.get("mocte") else None
        self.layers = [LayerFFN(f"model.layers.{i}.mlp") for i in range(self.config.num_layers)]
        self.trunk: dict[str, Tensor] = {}
        modes = {block["name"]: str(block["mode"]) for block in state.get("blocks") or []}
        strange = set(modes) - {layer.name for layer in self.layers}
        if strange:
            raise CheckpointError(f"the blocks {sorted(strange)} are no FFN of a layer (model.layers.N.mlp).")
        self.emerged = [i for i, layer in enumerate(self.layers) if modes.get(layer.name, "warmup") != "warmup"]
        for key, value in state_dict.items():
            match = _FFN.fullmatch(key)
            if match is None:
                self.trunk[key] = value
            elif self.layers[int(match[1])].name in modes:
                self._sort_block(int(match[1]), match[2], key, value)
            else:
                self.layers[int(match[1])].dense[match[2]] = value
        self._require_complete()

    @property
    def kind(self) -> str:
        """`ffn` or `lora`, or `dense` where no experts run."""
        return self.mocte.expert.kind if self.emerged and self.mocte else "dense"

    @property
    def num_experts(self) -> int:
        """E."""
        return self.mocte.num_experts if self.mocte else 0

    @property
    def expert_width(self) -> int:
        """Hidden units of one expert."""
        return self.layers[self.emerged[0]].experts[0]["gate_proj.weight"].shape[0]

    def _sort_block(self, number: int, rest: str, key: str, value: Tensor) -> None:
        layer = self.layers[number]
        if rest.startswith("dense."):
            layer.dense[rest.removeprefix("dense.")] = value
            return
        expert, gate = _EXPERT.fullmatch(rest), _GATE.fullmatch(rest)
        if expert is None and gate is None:
            raise CheckpointError(f"the checkpoint holds {key}, which this version cannot place.")
        if int((expert or gate)[1]) > 0:  # type: ignore[index]
            raise CheckpointError(f"{layer.name} has more than one bank of experts; no export knows such blocks.")
        if number not in self.emerged:
            return  # dormant: not part of the function
        if gate is not None:
            layer.gate[gate[2]] = value
        elif expert is not None:
            k = int(expert[2])
            layer.experts.extend({} for _ in range(k + 1 - len(layer.experts)))
            layer.experts[k][expert[3]] = value

    def _require_complete(self) -> None:
        parts = {"llama": ("gate_proj", "up_proj", "down_proj"), "gpt2": ("c_fc", "c_proj")}[self.config.style]
        needed = {f"{part}.weight" for part in parts}
        if self.config.style == "gpt2":
            needed |= {f"{part}.bias" for part in parts}
        for i, layer in enumerate(self.layers):
            if set(layer.dense) != needed:
                raise CheckpointError(
                    f"{layer.name} has the dense matrices {sorted(layer.dense)}, not {sorted(needed)}."
                )
            if i not in self.emerged:
                continue
            whole = [k for k, expert in enumerate(layer.experts) if set(expert) == needed]
            missing = sorted(set(range(self.num_experts)) - set(whole))
            if missing or len(layer.experts) != self.num_experts:
                raise CheckpointError(
                    f"{layer.name} should have {self.num_experts} experts; the experts {missing} are missing or incomplete "
                    f"and {len(layer.experts)} were found."
                )
            if not layer.gate:
                raise CheckpointError(f"the gate of {layer.name} is missing.")


def needs_bias(layer: LayerFFN) -> bool:
    """Whether the gate's bias changes the choice; the same bias for all experts does not."""
    bias = layer.gate.get("cluster_bias")
    return bias is not None and bool((bias != bias[0]).any())


def padded(matrix: Tensor, rows: int | None = None, columns: int | None = None) -> Tensor:
    """A matrix with zero rows and columns added up to a size: hidden units that give exactly nothing."""
    height, width = rows or matrix.shape[0], columns or matrix.shape[1]
    if matrix.shape == (height, width):
        return matrix
    larger = torch.zeros(height, width, dtype=matrix.dtype, device=matrix.device)
    larger[: matrix.shape[0], : matrix.shape[1]] = matrix
    return larger
