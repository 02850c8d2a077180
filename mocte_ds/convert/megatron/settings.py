"""Which GPTModel of megatron-core computes what a trained model computes, with its experts and routers."""

from dataclasses import asdict, dataclass
from typing import Any

from mocte_ds.base_model import make_config, require_base
from mocte_ds.bigrams import refuse_bigrams
from mocte_ds.checkpoints.names import expert_parameter
from mocte_ds.checkpoints.source import Source
from mocte_ds.convert.megatron.base_config import arguments_of
from mocte_ds.errors import CheckpointError
from mocte_ds.moe.block import Block, BlockMode

FFN = "model.layers.{layer}.mlp"
"""Path of a layer's FFN, and of the block that stands there."""
GATE = "{block}.banks.0.deepspeed_moe.gate."
"""What the names of a gate's tensors begin with."""

# megatron-core weighs top-1 by the softmax probability and by nothing else. Logits this much larger make it exactly 1
# wherever two of ours differ by 2e-11 or more; a power of two changes no bit of the router's directions.
_HARD = 2.0**40


@dataclass(frozen=True)
class Settings:
    """Arguments of megatron-core's classes; plain values."""

    transformer_config: dict[str, Any]
    """Of TransformerConfig, besides ``activation_func=torch.nn.functional.silu``."""
    gpt_model: dict[str, Any]
    """Of GPTModel."""
    router_scale: float
    """Factor between our routers and those in the folder."""

    def to_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return asdict(self)


def settings_of(source: Source, where: object) -> Settings:
    """The model that computes the same.

    Args:
        source: what is converted.
        where: names it, for messages.

    Raises:
        CheckpointError: there is none; says which key or setting stands in the way.
    """
    base = require_base(source.base, where)
    refuse_bigrams(base.get("bigram"), where, "a checkpoint of megatron-core")
    config = make_config(base, where).get_text_config()
    try:
        transformer, model = arguments_of(base["architecture"], config)
        blocks = {i: b for i, b in blocks_by_layer(source).items() if b.mode is not BlockMode.WARMUP}
        for block in blocks.values():
            _require_convertible(source, block)
    except CheckpointError as error:
        raise CheckpointError(f"{where} cannot be converted to megatron-core: {error}") from error
    scale = 1.0
    if blocks:
        first = next(iter(blocks.values()))
        router = first.banks[0].gate.router
        scale = _HARD if router.weight == "hard" else 1.0
        transformer |= {
            "num_moe_experts": first.num_experts,
            "moe_ffn_hidden_size": source.shapes[expert_parameter(first.name, 0, 0, "gate_proj.weight")][0],
            "moe_router_topk": router.top_k,
            # A softmax over the chosen alone is that over all, divided by the sum of the chosen.
            "moe_router_pre_softmax": not router.normalise,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
        }
        if len(blocks) < config.num_hidden_layers:
            transformer["moe_layer_freq"] = [int(i in blocks) for i in range(config.num_hidden_layers)]
    return Settings(transformer, model, scale)


def blocks_by_layer(source: Source) -> dict[int, Block]:
    """The blocks of a source by the number of their layer, whatever their mode.

    Raises:
        CheckpointError: one stands elsewhere than for the FFN of a layer.
    """
    blocks = {module.name: module for module in source.model.modules() if isinstance(module, Block)}
    layers = range(len(source.model.get_submodule("model.layers")))
    found = {i: blocks.pop(name) for i in layers if (name := FFN.format(layer=i)) in blocks}
    if blocks:
        raise CheckpointError(f"the block {min(blocks)} is not the FFN of a layer ({FFN.format(layer='N')}).")
    return found


def _require_convertible(source: Source, block: Block) -> None:
    """Refuse experts and routers that megatron-core does not have."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"{block.name} has {what}, which megatron-core's router and experts do not have; for a conversion, "
            "train with experts of the kind 'ffn', one bank, router.kind 'token' or 'random', and router.bias false."
        )

    if block.kind != "ffn":
        raise refuse(f"experts of the kind '{block.kind}'")
    if len(block.banks) != 1:
        raise refuse(f"{len(block.banks)} banks of experts")
    router = block.banks[0].gate.router
    if not block.banks[0].gate.key.stock:
        raise refuse(f"the router.kind '{router.kind}'")
    if router.weight in ("sigmoid", "gain"):
        raise refuse(f"the router.weight '{router.weight}'")
    if router.unit_mean:
        raise refuse("router.unit_mean")
    # The same bias for all experts changes neither the choice nor the softmax.
    bias = source.read(f"{GATE.format(block=block.name)}key.cluster_bias")
    if (bias != bias[0]).any():
        raise refuse("a gate with a bias")
