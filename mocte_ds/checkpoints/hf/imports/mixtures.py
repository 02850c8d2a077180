"""Which experts and routers a Hugging Face folder holds, as the "mocte" block of a run that keeps them."""

from typing import Any

from mocte_ds.checkpoints.hf.imports.keys import Foreign, Keys, llama_like, require_whole_attention


def mixtral(name: str, keys: Keys) -> Foreign:
    """Experts in every layer, whose weights add up to 1."""
    require_whole_attention(keys, keys["sliding_window"])
    return Foreign(name, llama_like(keys), _kept(keys, keys["num_local_experts"], True))


def olmoe(name: str, keys: Keys) -> Foreign:
    """Experts in every layer, behind norms of queries and keys."""
    keys.require("attention_bias", False)
    keys.require("clip_qkv", None)
    mocte = _kept(keys, keys["num_experts"], bool(keys["norm_topk_prob"]))
    return Foreign(name, llama_like(keys, qk_norm=True), mocte)


def qwen2moe(name: str, keys: Keys) -> Foreign:
    """Experts in some layers, beside a shared one that must be empty."""
    if keys["use_sliding_window"]:
        require_whole_attention(keys, keys["sliding_window"])
    every, dense = keys["decoder_sparse_step"], keys["mlp_only_layers"] or []
    layers = [i for i in range(keys["num_hidden_layers"]) if i not in dense and (i + 1) % every == 0]
    width = keys["moe_intermediate_size"]
    if len(layers) < keys["num_hidden_layers"] and width != keys["intermediate_size"]:
        keys.refuse(
            "moe_intermediate_size",
            width,
            f"our experts are as wide as the dense layers, which are {keys['intermediate_size']} wide here.",
        )
    decoder = llama_like(keys, width, qkv_bias=bool(keys["qkv_bias"]))
    mocte = _kept(keys, keys["num_experts"], bool(keys["norm_topk_prob"]), layers)
    return Foreign(name, decoder, mocte, keys["shared_expert_intermediate_size"])


def glm4moe(name: str, keys: Keys) -> Foreign:
    """Narrow experts beside a shared FFN, behind dense layers."""
    if keys["num_experts_per_tok"] != 1:
        keys.refuse(
            "num_experts_per_tok",
            keys["num_experts_per_tok"],
            "1 is supported: several experts are weighed by a sigmoid in Glm4Moe, and by a softmax in our routers.",
        )
    for key, wanted in (
        ("norm_topk_prob", True),
        ("n_group", 1),
        ("topk_group", 1),
        ("routed_scaling_factor", 1.0),
        ("use_qk_norm", False),
    ):
        keys.require(key, wanted)
    layers = list(range(keys["first_k_dense_replace"], keys["num_hidden_layers"]))
    mocte = _kept(keys, keys["n_routed_experts"], True, layers)
    mocte["expert"] = {"kind": "lora", "width": keys["moe_intermediate_size"]}
    decoder = llama_like(keys, qkv_bias=bool(keys["attention_bias"]))
    return Foreign(name, decoder, mocte, keys["n_shared_experts"] * keys["moe_intermediate_size"])


def _kept(keys: Keys, experts: int, normalised: bool, layers: list[int] | None = None) -> dict[str, Any]:
    """The "mocte" block of a folder's experts; their routers are linear maps, which train on where they can.

    Args:
        keys: of the config.
        experts: in a layer.
        normalised: whether the weights of a token's experts add up to 1.
        layers: that have experts; None: all.
    """
    k = keys["num_experts_per_tok"]
    hard = k == 1 and normalised
    if experts < 2 or not 1 <= k <= experts:
        keys.refuse(
            "num_experts_per_tok", k, f"it must lie between 1 and the {experts} experts, of which 2 are needed."
        )
    everywhere = layers is None or len(layers) == keys["num_hidden_layers"]
    if not everywhere and not layers:
        keys.refuse("num_hidden_layers", keys["num_hidden_layers"], "no layer has experts.")
    return {
        "modules": "model.layers.*.mlp" if everywhere else [f"model.layers.{layer}.mlp" for layer in layers or []],
        "num_experts": experts,
        "spectrum": {"rows": max(2048, 16 * experts)},
        "router": {
            "kind": "random",
            "bias": False,
            "weight": "hard" if hard else "softmax",
            "learn": not hard and not keys.fixed_router,
            "top_k": k,
            "normalise": normalised and k > 1,
        },
    }
