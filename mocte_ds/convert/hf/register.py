"""Lets transformers' Auto classes load exports with experts: `import mocte_ds.convert.hf.register`."""

from transformers import AutoConfig, AutoModelForCausalLM

from mocte_ds.remote_code.configuration_blocks_mocte import MocteBlocksConfig
from mocte_ds.remote_code.modeling_blocks_mocte import MocteBlocksForCausalLM

AutoConfig.register(MocteBlocksConfig.model_type, MocteBlocksConfig, exist_ok=True)
AutoModelForCausalLM.register(MocteBlocksConfig, MocteBlocksForCausalLM, exist_ok=True)
# So that save_pretrained copies the code, which is not part of transformers.
MocteBlocksConfig.register_for_auto_class()
MocteBlocksForCausalLM.register_for_auto_class("AutoModelForCausalLM")
