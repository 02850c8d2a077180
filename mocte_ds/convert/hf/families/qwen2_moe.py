"""Qwen2-MoE: experts in any choice of layers, any weights of a softmax; its shared expert must be empty."""

from typing import Any

from mocte_ds.convert.hf.families.family import Family, Refusal, Start, kept_block, register
from mocte_ds.convert.hf.families.run import Mixture

_EMPTY = 8
"""Hidden units of an empty shared expert."""


class QwenMoe(Family):
    """What the two generations share."""

    def fits(self, run: Mixture) -> str | None:
        """See :meth:`Family.fits`."""
        if run.architecture == self.architecture and (own := set(sparse_layers(run.config)) - set(run.emerged)):
            return f"layer {min(own)} has experts of the class itself beside those of blocks"
        if run.router.weight == "sigmoid":
            return f"{self.architecture} weighs by a softmax; train with router.weight 'hard' or 'softmax'"
        return None

    def config_to(self, run: Mixture) -> dict[str, Any]:
        """See :meth:`Family.config_to`."""
        found = {
            "moe_intermediate_size": run.width,
            "num_experts": run.some.num_experts,
            "num_experts_per_tok": run.router.top_k,
            "norm_topk_prob": run.normalised,
        }
        same = run.architecture == self.architecture
        if same and sparse_layers(run.config) == sorted(run.emerged):
            return found
        dense = [layer for layer in range(run.count) if layer not in run.emerged]
        window = {} if same else {"use_sliding_window": False}
        return {**found, "mlp_only_layers": dense, "decoder_sparse_step": 1, **window}

    def config_from(self, config: Any, fixed_router: bool) -> Start:
        """See :meth:`Family.config_from`."""
        layers = sparse_layers(config)
        block = kept_block(config, config.num_experts, bool(config.norm_topk_prob), layers, fixed_router)
        return Start(dict.fromkeys(layers, config.moe_intermediate_size), block)


def sparse_layers(config: Any) -> list[int]:
    """Numbers of the layers with experts.

    Raises:
        Refusal: a step that no count has.
    """
    step, dense = config.decoder_sparse_step, config.mlp_only_layers or []
    if type(step) is not int or step < 1:
        raise Refusal("decoder_sparse_step", step, "it must be 1 or more.")
    return [i for i in range(config.num_hidden_layers) if i not in dense and (i + 1) % step == 0]


@register
class Qwen2Moe(QwenMoe):
    """Qwen2MoeForCausalLM."""

    architecture = "Qwen2MoeForCausalLM"
    bases = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
    # The class insists on a shared expert; hidden units of zeros add exactly nothing. torchao cannot quantise a single
    # one, and llama.cpp divides by what the expert's own gate gives, so that this is not zero.
    empty = (
        ("mlp.shared_expert.gate_proj.weight", (_EMPTY, None), 0.0),
        ("mlp.shared_expert.up_proj.weight", (_EMPTY, None), 0.0),
        ("mlp.shared_expert.down_proj.weight", (None, _EMPTY), 0.0),
        ("mlp.shared_expert_gate.weight", (1, None), 1.0),
    )

    def config_to(self, run: Mixture) -> dict[str, Any]:
        """See :meth:`Family.config_to`."""
        found = {**super().config_to(run), "shared_expert_intermediate_size": _EMPTY}
        if run.architecture == self.architecture:
            return found
        return {**found, "qkv_bias": run.architecture == "Qwen2ForCausalLM"}
