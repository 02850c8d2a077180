"""OLMoE: experts in every layer, after norms of all queries and all keys."""

from typing import Any

from mocte_ds.convert.hf.families.family import Family, Start, kept_block, register, require_value
from mocte_ds.convert.hf.families.run import Mixture


@register
class Olmoe(Family):
    """OlmoeForCausalLM; no dense class has its attention, so that only runs that start from it become it."""

    architecture = "OlmoeForCausalLM"

    def fits(self, run: Mixture) -> str | None:
        """See :meth:`Family.fits`."""
        if len(run.emerged) < run.count:
            return "OLMoE has experts in every layer"
        return "OLMoE weighs by a softmax" if run.router.weight == "sigmoid" else None

    def config_to(self, run: Mixture) -> dict[str, Any]:
        """See :meth:`Family.config_to`."""
        return {
            "intermediate_size": run.width,
            "num_experts": run.some.num_experts,
            "num_experts_per_tok": run.router.top_k,
            "norm_topk_prob": run.normalised,
        }

    def config_from(self, config: Any, fixed_router: bool) -> Start:
        """See :meth:`Family.config_from`."""
        require_value(config, "clip_qkv", None, "attention of other sizes was not tried.")
        layers = list(range(config.num_hidden_layers))
        block = kept_block(config, config.num_experts, bool(config.norm_topk_prob), layers, fixed_router)
        return Start(dict.fromkeys(layers, config.intermediate_size), block)
