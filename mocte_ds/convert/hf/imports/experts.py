"""How the experts and routers of a Hugging Face folder become those of our blocks."""

import torch
from torch import Tensor, nn

from mocte_ds.checkpoints.names import EXPERT_PARAMETER
from mocte_ds.convert.hf.folder import Folder
from mocte_ds.convert.hf.imports.keys import Foreign
from mocte_ds.convert.hf.imports.weights import EMBEDDING, Plan, Planner
from mocte_ds.moe.block import Block

_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_GATE_KEY, _GATE_BIAS, _RESIDUAL = "gate.key.cluster_weight", "gate.key.cluster_bias", "gate.cluster_residual"
_CORRECTION = "gate.cluster_correction"


def plan_mixture(folder: Folder, foreign: Foreign, model: nn.Module) -> Plan:
    """Where the tensors of a decoder with blocks come from.

    The folder's router becomes the gate's fixed part; what is learned from now on is added to it and starts at zero.

    Args:
        folder: whose tensors are taken.
        foreign: its config in our terms.
        model: the decoder with its blocks, without weights.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape, or has no place in our blocks.
    """
    planner = Planner(folder, model)
    blocks = {module.name: module for module in model.modules() if isinstance(module, Block)}
    for name in model.state_dict():
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        if block is None:
            planner.take(name)
        else:
            _take(planner, foreign, blocks[block], name)
    if foreign.architecture == "Qwen2MoeForCausalLM":
        for block in blocks:
            for part in ("gate_proj", "up_proj", "down_proj"):
                planner.use_zeros(f"{block}.shared_expert.{part}.weight")
            planner.use_zeros(f"{block}.shared_expert_gate.weight")
    return planner.finish(model.config.tied)


def _take(planner: Planner, foreign: Foreign, block: Block, name: str) -> None:
    """One tensor of a block."""
    theirs, parts = block.name, {}
    if foreign.architecture == "MixtralForCausalLM":
        theirs, parts = f"{block.name.removesuffix('mlp')}block_sparse_moe", _MIXTRAL
    expert = EXPERT_PARAMETER.fullmatch(name)
    if expert:
        part = expert[4].removesuffix(".weight")
        planner.take(name, f"{theirs}.experts.{expert[3]}.{parts.get(part, part)}.weight")
    elif name.endswith(_GATE_KEY):
        planner.take(name, f"{theirs}.gate.weight", make=Tensor.float)
    elif (
        name.endswith(_CORRECTION) and (correction := f"{theirs}.gate.e_score_correction_bias") in planner.folder.blanks
    ):
        planner.take(name, correction, make=Tensor.float)
    elif name.endswith((_GATE_BIAS, _RESIDUAL, _CORRECTION)):
        planner.zero(name, torch.float32)
    elif block.kind == "lora":
        planner.take(name, name.replace(".dense.", ".shared_experts."))
    else:
        # The FFN of which such experts would have been born; it takes no part any more.
        planner.zero(name, planner.folder.blanks[EMBEDDING].dtype)
