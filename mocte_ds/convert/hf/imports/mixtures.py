"""Which experts and routers a Hugging Face folder holds, as the "mocte" block of a run that keeps them."""

from typing import Any

from mocte_ds.convert.hf.imports.keys import Foreign, Keys, llama_like, require_whole_attention


def mixtral(name: str, keys: Keys) -> Foreign:
    """Experts in every layer, whose weights add up to 1."""
    decoder = llama_like(keys, sliding_window=keys["sliding_window"])
    return Foreign(name, decoder, _kept(keys, keys["num_local_experts"], True))


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
    every, dense = keys["decoder_sparse_step"], keys["mlp_only_layers"]
    dense = [] if dense is None else dense
    layers = [i for i in range(keys["num_hidden_layers"]) if i not in dense and (i + 1) % every == 0]
    sizes = _ffn_sizes(keys, layers, keys["moe_intermediate_size"])
    decoder = llama_like(keys, qkv_bias=bool(keys["qkv_bias"]), ffn_sizes=sizes)
    mocte = _kept(keys, keys["num_experts"], bool(keys["norm_topk_prob"]), layers)
    return Foreign(name, decoder, mocte)


def glm4moe(name: str, keys: Keys) -> Foreign:
    """Narrow experts beside a shared FFN, behind dense layers."""
    for key in ("n_group", "topk_group"):
        keys.require(key, 1, "our routers choose among all experts.")
    first, count = keys["first_k_dense_replace"], keys["num_hidden_layers"]
    if not 0 <= first <= count:
        keys.refuse("first_k_dense_replace", first, f"it must lie between 0 and the {count} layers.")
    layers = list(range(first, count))
    normalised, width = bool(keys["norm_topk_prob"]), keys["moe_intermediate_size"]
    mocte = _kept(keys, keys["n_routed_experts"], normalised, layers)
    mocte["expert"] = {"kind": "lora", "width": width}
    # A single weight that is divided by itself gives a router no gradient.
    learn = not keys.fixed_router and not (keys["num_experts_per_tok"] == 1 and normalised)
    scale = float(keys["routed_scaling_factor"])
    mocte["router"] |= {"weight": "sigmoid", "learn": learn, "normalise": normalised, "scale": scale}
    sizes = _ffn_sizes(keys, layers, keys["n_shared_experts"] * width)
    norm, bias = bool(keys["use_qk_norm"]), bool(keys["attention_bias"])
    return Foreign(name, llama_like(keys, partial=True, qkv_bias=bias, head_norm=norm, ffn_sizes=sizes), mocte)


def _ffn_sizes(keys: Keys, layers: list[int], width: int) -> list[int] | None:
    """Hidden units of each layer's FFN, if those of the layers with experts are others."""
    if width == keys["intermediate_size"]:
        return None
    return [width if i in layers else keys["intermediate_size"] for i in range(keys["num_hidden_layers"])]


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
