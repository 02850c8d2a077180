"""Every expert of an exported layer by its number, and the layer's function around every row of its gate."""

import torch
from torch import Tensor, nn

from mocte_ds.convert.hf.closeness import MARGIN, margins, require_close
from mocte_ds.convert.hf.pieces import Pieces
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block
from mocte_ds.moe.forward import ForwardState
from mocte_ds.moe.keys import LinearKey
from mocte_ds.remote_code.routing_mocte import read_tokens

_GATED = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def compare_experts(block: Block, trained: nn.Module, model: nn.Module, pieces: Pieces) -> int:
    """Compare the experts of one layer.

    Args:
        block: of the trained model; only its structure is looked at.
        trained: the same with its weights, or in warm-up its dense FFN.
        model: the export as a model of this layer alone.
        pieces: that it comes from.

    Returns:
        How many experts.

    Raises:
        CheckpointError: one is missing or another one's, or the layer computes something else.
    """
    layer = model.get_submodule(f"{pieces.layout.layers}.0")
    mlp = layer.mlp
    stored = _own(mlp) if hasattr(mlp, "banks") else _stock(mlp)
    if not stored:
        raise CheckpointError(f"{pieces.folder}: the experts of {block.name} are not there.")
    if not isinstance(trained, Block):  # in warm-up, beside experts of zeros
        if any(matrix.any() for expert in stored for name, matrix in expert.items() if name.startswith("down")):
            raise CheckpointError(f"{pieces.folder}: {block.name} is in warm-up, but its experts are not empty.")
        return len(stored)
    experts = [expert for bank in trained.banks for expert in bank.local_experts]
    if len(stored) != len(experts):
        raise CheckpointError(f"{pieces.folder}: {block.name} has {len(experts)} experts, the export {len(stored)}.")
    for k, (expert, found) in enumerate(zip(experts, stored, strict=True)):
        for name, weight in expert.state_dict().items():
            if name not in found or not _is_filled_up(found[name], weight):
                raise CheckpointError(f"{pieces.folder}: {name} of expert {k} of {block.name} is not the trained one.")
    _compare_function(trained, mlp, model, pieces)
    return len(experts)


@torch.no_grad()
def _compare_function(block: Block, mlp: nn.Module, model: nn.Module, pieces: Pieces) -> None:
    """Features around each row of the gates, so that no expert goes unseen only because few texts lead to it."""
    gates = [bank.gate for bank in block.banks if isinstance(bank.gate.key, LinearKey)]
    generator, d = torch.Generator().manual_seed(0), block.hidden_size
    rows = torch.cat([gate.linear()[0] for gate in gates]) if gates else torch.randn(4, d, generator=generator)
    near = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30) * d**0.5
    features = near.repeat_interleave(8, dim=0)
    features = (features + 0.3 * torch.randn(features.shape, generator=generator))[None]
    ids = torch.randint(pieces.layout.config.vocab_size, features.shape[:2], generator=generator)
    known = ForwardState(ids, block.context.eod_id)
    with block.context.running(known):
        clear, expected = margins(block, features) > MARGIN, block(features)
    if not clear.any():
        return  # a gate of equal rows, which the logits will show
    inputs = (features, read_tokens(model.config, features, ids)) if hasattr(mlp, "banks") else (features,)
    output = pieces.run(mlp, *inputs)
    require_close(output[clear], expected[clear], f"{pieces.folder}: the outputs of {block.name}")


def _own(mlp: nn.Module) -> list[dict[str, Tensor]]:
    return [expert.state_dict() for bank in mlp.banks for expert in bank.experts]


def _stock(mlp: nn.Module) -> list[dict[str, Tensor]]:
    experts = getattr(mlp, "experts", None)
    if experts is None:
        return []
    matrices = ((*fused.chunk(2), down) for fused, down in zip(experts.gate_up_proj, experts.down_proj, strict=True))
    return [dict(zip(_GATED, triple, strict=True)) for triple in matrices]


def _is_filled_up(stored: Tensor, trained: Tensor) -> bool:
    """Whether a matrix is the trained one, with nothing but zeros behind its last row or column."""
    region = tuple(slice(size) for size in trained.shape)
    return torch.equal(stored[region], trained) and stored.count_nonzero() == trained.count_nonzero()
