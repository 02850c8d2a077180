"""Which stock transformers class a trained model is, exactly."""

from torch import nn

from mocte_ds.checkpoints.hf.dense import Layout, SpecialIds, gpt2, llama
from mocte_ds.checkpoints.hf.experts import glm4moe, mixtral, qwen2moe
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block, BlockMode


def choose_layout(model: nn.Module, special: SpecialIds) -> Layout:
    """The stock class that computes what the model computes.

    Llama or GPT-2 where no block has emerged. Else, for experts of the kind `ffn`, Mixtral (weight 1, experts in every
    layer) or Qwen2Moe (any weight, any layers), and Glm4Moe for `lora` (docs/method.md, section 8).

    Args:
        model: a Decoder with its blocks, all experts local.
        special: ids of the tokenizer's special tokens.

    Raises:
        CheckpointError: there is none; says which setting stands in the way and what to use instead.
    """
    blocks = ffn_blocks(model)
    emerged = {i: block for i, block in blocks.items() if block.mode is not BlockMode.WARMUP}
    if not emerged:
        return gpt2(model, special) if model.config.style == "gpt2" else llama(model, special)
    if model.config.style != "llama":
        raise CheckpointError("no stock class has experts in the GPT-2 style; export a run of the llama style.")
    for block in emerged.values():
        _require_exportable(block)
    some = next(iter(emerged.values()))
    weight = some.banks[0].gate.router.weight
    if some.kind == "lora":
        return glm4moe(model, blocks, weight, special)
    if weight == "hard" and len(emerged) == model.config.num_layers:
        return mixtral(model, emerged, special)
    # A block in warm-up is a dense layer.
    return qwen2moe(model, emerged, weight, special)


def ffn_blocks(model: nn.Module) -> dict[int, Block]:
    """The blocks of a decoder by the number of their layer.

    Raises:
        CheckpointError: a block stands elsewhere than for the FFN of a layer.
    """
    blocks = {i: layer.mlp for i, layer in enumerate(model.model.layers) if isinstance(layer.mlp, Block)}
    strange = [m.name for m in model.modules() if isinstance(m, Block) and m not in blocks.values()]
    if strange:
        raise CheckpointError(
            f"the block {strange[0]} is no FFN of a layer (model.layers.N.mlp); no stock class has experts there."
        )
    return blocks


def _require_exportable(block: Block) -> None:
    if len(block.banks) != 1:
        raise CheckpointError(f"{block.name} has {len(block.banks)} banks of experts; stock classes have one.")
    gate = block.banks[0].gate
    if gate.router.kind not in ("token", "random"):  # a linear map of the token's own feature
        raise CheckpointError(
            f"no stock class routes by router.kind '{gate.router.kind}'; to export, train with router.kind 'token' "
            "and router.bias false."
        )
    # The same bias for all experts changes neither the choice nor the softmax.
    bias = gate.linear()[1]
    if (bias != bias[0]).any():
        raise CheckpointError(
            f"stock gates have no bias, that of {block.name} has one; to export, train with router.bias false."
        )
