"""Mixtral: experts in every layer, whose weights add up to 1."""

from typing import Any

from mocte_ds.convert.hf.families.family import Family, Start, kept_block, register
from mocte_ds.convert.hf.families.run import Mixture


@register
class Mixtral(Family):
    """MixtralForCausalLM."""

    architecture = "MixtralForCausalLM"
    bases = ("LlamaForCausalLM", "MistralForCausalLM")
    experts = "block_sparse_moe.experts.{k}.{matrix}.weight"
    gate = "block_sparse_moe.gate.weight"
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # noqa: RUF012
    routing = "softmax over the chosen experts"

    def fits(self, run: Mixture) -> str | None:
        """See :meth:`Family.fits`."""
        if len(run.emerged) < run.count:
            return "Mixtral has experts in every layer; let mocte.modules name all"
        if run.router.weight == "sigmoid" or not run.normalised:
            return "Mixtral has weights that add up to 1; train with router.weight 'hard' or router.normalise"
        return None

    def config_to(self, run: Mixture) -> dict[str, Any]:
        """See :meth:`Family.config_to`."""
        return {
            "intermediate_size": run.width,
            "num_local_experts": run.some.num_experts,
            "num_experts_per_tok": run.router.top_k,
            # A Llama's attention reads no such key, though its config may have one.
            "sliding_window": None if run.architecture == "LlamaForCausalLM" else run.config.sliding_window,
        }

    def config_from(self, config: Any, fixed_router: bool) -> Start:
        """See :meth:`Family.config_from`."""
        layers = list(range(config.num_hidden_layers))
        block = kept_block(config, config.num_local_experts, True, layers, fixed_router)
        return Start(dict.fromkeys(layers, config.intermediate_size), block)
