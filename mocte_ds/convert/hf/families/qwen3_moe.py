"""Qwen3-MoE: experts in any choice of layers, after norms of the heads' queries and keys; no shared expert."""

from mocte_ds.convert.hf.families.family import register
from mocte_ds.convert.hf.families.qwen2_moe import QwenMoe


@register
class Qwen3Moe(QwenMoe):
    """Qwen3MoeForCausalLM."""

    architecture = "Qwen3MoeForCausalLM"
    bases = ("Qwen3ForCausalLM",)
