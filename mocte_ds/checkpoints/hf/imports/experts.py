"""How the experts and routers of a Hugging Face folder become those of our blocks."""

import torch
from torch import Tensor, nn

from mocte_ds.checkpoints.hf.folder import Folder
from mocte_ds.checkpoints.hf.imports.keys import Foreign
from mocte_ds.checkpoints.hf.imports.weights import EMBEDDING, Plan, Planner
from mocte_ds.checkpoints.names import EXPERT_PARAMETER
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block

_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_GATE_KEY, _GATE_BIAS, _RESIDUAL = "gate.key.cluster_weight", "gate.key.cluster_bias", "gate.cluster_residual"


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
    for block in blocks if foreign.architecture == "Glm4MoeForCausalLM" else ():
        _require_no_correction(planner, f"{block}.gate.e_score_correction_bias")
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
    elif name.endswith((_GATE_BIAS, _RESIDUAL)):
        planner.zero(name, torch.float32)
    elif block.kind == "lora":
        _take_shared(planner, foreign, name, name.replace(".dense.", ".shared_experts."))
    else:
        # The FFN of which such experts would have been born; it takes no part any more.
        planner.zero(name, planner.folder.blanks[EMBEDDING].dtype)


def _take_shared(planner: Planner, foreign: Foreign, name: str, source: str) -> None:
    """The FFN beside the experts; units of zeros may fill it up in the folder."""
    axis = 1 if "down_proj" in name else 0
    units = planner.shape(name)[axis]
    if foreign.shared_units == units:
        planner.take(name, source)
        return
    if foreign.shared_units < units or source not in planner.folder.blanks:
        raise CheckpointError(
            f"{planner.folder.folder}: the shared experts are {foreign.shared_units} wide, the dense layers {units}; "
            "our blocks have one width for both."
        )
    if planner.folder.read(source).narrow(axis, units, foreign.shared_units - units).any():
        raise CheckpointError(
            f"{planner.folder.folder}: {source} has more than the {units} hidden units of the dense layers; our blocks "
            "have one width for both."
        )
    planner.take(name, source, make=lambda matrix: matrix.narrow(axis, 0, units).clone())


def _require_no_correction(planner: Planner, source: str) -> None:
    if source in planner.folder.blanks:
        bias = planner.folder.read(source)
        if (bias != bias[0]).any():
            raise CheckpointError(
                f"{planner.folder.folder}: {source} moves the choice of experts; our routers have no such bias."
            )
        planner.use(source)
