"""Which transformers class a trained model becomes: a stock one that computes the same exactly, else our own."""

from mocte_ds.checkpoints.source import Source
from mocte_ds.config import RouterConfig
from mocte_ds.convert.hf.dense import Layout, SpecialIds, gpt2, llama
from mocte_ds.convert.hf.experts import GATE, glm4moe, mixtral, olmoe, qwen2moe
from mocte_ds.convert.hf.own import own
from mocte_ds.errors import CheckpointError, ConfigError
from mocte_ds.moe.block import Block

CHOICES = ("auto", "stock", "own")


def choose_layout(source: Source, special: SpecialIds, choice: str = "auto") -> Layout:
    """The class that computes what the model computes.

    Args:
        source: what is exported.
        special: ids of the tokenizer's special tokens.
        choice: `stock`: one of transformers' classes or none; `own`: the project's; `auto`: a stock one where it fits.

    Raises:
        CheckpointError: there is none; says which setting stands in the way and what to use instead.
        ConfigError: an unknown choice.
    """
    if choice not in CHOICES:
        raise ConfigError(f"class = {choice!r} is not one of {list(CHOICES)}.")
    _ = source.blocks  # refuses blocks that stand elsewhere than for an FFN
    if choice == "own":
        return own(source, special)
    try:
        return stock_layout(source, special)
    except CheckpointError as error:
        if choice == "stock":
            raise
        return own(source, special, str(error))


def stock_layout(source: Source, special: SpecialIds) -> Layout:
    """One of transformers' classes.

    Llama, Qwen2 or GPT-2 where no block has emerged. Else, for experts of the kind `ffn`, Mixtral (weights that add up
    to 1, experts in every layer), OLMoE (norms of queries and keys) or Qwen2Moe (any weight, any layers), and Glm4Moe
    for `lora` (docs/huggingface.md).

    Raises:
        CheckpointError: none computes the same; says why.
    """
    emerged = source.emerged
    if not emerged:
        return gpt2(source, special) if source.config.style == "gpt2" else llama(source, special)
    if source.config.style != "llama":
        raise CheckpointError("no stock class has experts in the GPT-2 style; export with --class own.")
    for block in emerged.values():
        _require_exportable(source, block)
    some = next(iter(emerged.values()))
    router, everywhere = some.banks[0].gate.router, len(emerged) == source.config.num_layers
    if source.config.qk_norm and (some.kind != "ffn" or not everywhere):
        raise CheckpointError(
            "OLMoE, the stock class for model.qk_norm, has experts of the kind 'ffn' in every layer; export with "
            "--class own."
        )
    sigmoid = router.weight == "sigmoid"
    if sigmoid and some.kind != "lora":
        raise CheckpointError(
            "Glm4Moe, the stock class for router.weight 'sigmoid', has experts of the kind 'lora'; export with "
            "--class own."
        )
    glm = some.kind == "lora" and not source.config.qk_norm
    for name, usual, fits in (
        ("head_norm", False, glm),
        ("rotary_share", 1.0, glm),
        ("sliding_window", None, some.kind == "ffn" and everywhere and not source.config.qk_norm),
    ):
        if getattr(source.config, name) != usual and not fits:
            raise CheckpointError(f"no stock class with such experts has model.{name}; export with --class own.")
    if source.config.qk_norm:
        return olmoe(source, special)
    if some.kind == "lora":
        return glm4moe(source, special)
    if source.config.sliding_window is not None and (source.config.qkv_bias or not _adds_up_to_one(router)):
        raise CheckpointError("Mixtral alone has model.sliding_window, and no biases; export with --class own.")
    if _adds_up_to_one(router) and everywhere and not source.config.qkv_bias and source.config.ffn_sizes is None:
        return mixtral(source, special)
    # A block in warm-up is a dense layer.
    return qwen2moe(source, special)


def _adds_up_to_one(router: RouterConfig) -> bool:
    return router.weight == "hard" or router.normalise


def _require_exportable(source: Source, block: Block) -> None:
    if len(block.banks) != 1:
        raise CheckpointError(f"{block.name} has {len(block.banks)} banks of experts; stock classes have one.")
    gate = block.banks[0].gate
    if not gate.key.stock:
        raise CheckpointError(
            f"no stock class routes by router.kind '{gate.router.kind}'; for one, train with router.kind 'token' "
            "and router.bias false."
        )
    if gate.unit_mean:
        raise CheckpointError(
            "no stock class divides weights by their mean; for one, train with router.unit_mean false."
        )
    # The same bias for all experts changes neither the choice nor the softmax.
    bias = source.read(f"{GATE.format(block=block.name)}key.cluster_bias")
    if (bias != bias[0]).any():
        raise CheckpointError(
            f"stock gates have no bias, that of {block.name} has one; for a stock class, train with router.bias false."
        )
