"""GLM-4-MoE: dense layers in front, then in every layer a shared FFN beside narrow experts weighed by sigmoids."""

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from mocte_ds.convert.hf.families.family import Family, Refusal, Start, kept_block, register, require_value
from mocte_ds.convert.hf.families.run import Mixture
from mocte_ds.convert.hf.families.tensors import LAYER, Pair
from mocte_ds.moe.block import Block


class SharedFFN(Family):
    """What GLM-4-MoE and DeepSeek-V3 share."""

    kind = "lora"
    correction = "mlp.gate.e_score_correction_bias"
    shared = "mlp.shared_experts.{matrix}.weight"
    routing = "sigmoid of each expert"

    def fits(self, run: Mixture) -> str | None:
        """See :meth:`Family.fits`."""
        first = min(run.emerged)
        if not set(run.blocks) >= set(range(first, run.count)):
            return (
                f"{self.architecture}, for experts of the kind 'lora', has dense layers in front only; to export, let "
                f"mocte.modules name all layers from {first} on, or use expert.kind 'ffn'"
            )
        if run.router.weight == "softmax":
            return (
                f"{self.architecture}, for experts of the kind 'lora', weighs by a sigmoid, not by a softmax; to "
                "export, train with router.weight 'hard' or 'sigmoid'"
            )
        return None

    def sparse(self, run: Mixture) -> dict[int, Block]:
        """A block in warm-up after the first one that has emerged has experts too: they are born as zero."""
        return {i: run.blocks[i] for i in range(min(run.emerged), run.count)}

    def config_to(self, run: Mixture) -> dict[str, Any]:
        """See :meth:`Family.config_to`."""
        return {
            "moe_intermediate_size": run.width,
            "n_shared_experts": math.ceil(run.ffn_width(self.sparse(run)) / run.width),
            "n_routed_experts": run.some.num_experts,
            "num_experts_per_tok": run.router.top_k,
            "first_k_dense_replace": min(run.emerged),
            "norm_topk_prob": run.normalised,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": run.router.scale,
            "num_nextn_predict_layers": 0,
        }

    def config_from(self, config: Any, fixed_router: bool) -> Start:
        """See :meth:`Family.config_from`."""
        for key in ("n_group", "topk_group"):
            require_value(config, key, 1, "our routers choose among all experts.")
        first, count, shared = config.first_k_dense_replace, config.num_hidden_layers, config.n_shared_experts
        if type(first) is not int or not 0 <= first <= count:
            raise Refusal("first_k_dense_replace", first, f"it must lie between 0 and the {count} layers.")
        if type(shared) is not int or shared < 1:
            raise Refusal("n_shared_experts", shared, "experts beside a shared FFN need one.")
        normalised, width = bool(config.norm_topk_prob), config.moe_intermediate_size
        layers = list(range(first, count))
        block = kept_block(config, config.n_routed_experts, normalised, layers, fixed_router)
        # A single weight that is divided by itself gives a router no gradient.
        learn = not fixed_router and not (config.num_experts_per_tok == 1 and normalised)
        scale = float(config.routed_scaling_factor)
        block["router"] |= {"weight": "sigmoid", "learn": learn, "normalise": normalised, "scale": scale}
        block["expert"] = {"kind": "lora", "width": width}
        return Start(dict.fromkeys(layers, shared * width), block)

    def gate_pair(self, run: Mixture, layer: int, block: Block) -> Pair:
        """See :meth:`Family.gate_pair`; a hard choice is scaled to where sigmoids tell experts apart."""
        pair = super().gate_pair(run, layer, block)
        if run.router.weight == "sigmoid":
            return pair
        norm = f"{LAYER.format(layer=layer)}post_attention_layernorm.weight"

        def scaled(norm_weight: Tensor, *parts: Tensor) -> Tensor:
            rows = pair.make(*parts)
            return rows * sigmoid_scale(rows, norm_weight)

        return replace(pair, ours=(norm, *pair.ours), make=scaled)


def sigmoid_scale(gate: Tensor, norm_weight: Tensor) -> float:
    """Power of two that brings a gate's logits into [-1, 1], where no sigmoid is so flat that experts tie.

    Without a bias any scale leaves the choice as it is, and a power of two leaves every bit of it.

    Args:
        gate: (E, d).
        norm_weight: (d,) of the RMSNorm in front, whose output is at most sqrt(d) long before this factor.
    """
    largest = float((gate * norm_weight.detach()).norm(dim=1).max()) * gate.shape[1] ** 0.5
    return 2.0 ** -math.ceil(math.log2(largest)) if largest > 0 else 1.0


@register
class Glm4Moe(SharedFFN):
    """Glm4MoeForCausalLM."""

    architecture = "Glm4MoeForCausalLM"
    bases = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

    def config_to(self, run: Mixture) -> dict[str, Any]:
        """See :meth:`Family.config_to`."""
        found = super().config_to(run)
        if run.architecture == self.architecture:
            return found
        rope = {**run.config.rope_parameters, "partial_rotary_factor": 1.0}
        attention = {
            "rope_parameters": rope,
            "use_qk_norm": run.architecture == "Qwen3ForCausalLM",
            "attention_bias": run.architecture == "Qwen2ForCausalLM",
        }
        return {**found, **attention}
