"""DeepSeek-V3: GLM-4-MoE's experts after latent attention, with one group of experts."""

from mocte_ds.convert.hf.families.family import register
from mocte_ds.convert.hf.families.glm4_moe import SharedFFN


@register
class DeepseekV3(SharedFFN):
    """DeepseekV3ForCausalLM; no dense class has its attention, so that only runs that start from it become it."""

    architecture = "DeepseekV3ForCausalLM"
