"""Mixture classes of transformers, one file each: which runs become one, and which folders runs start from."""

from mocte_ds.convert.hf.families import deepseek_v3, glm4_moe, mixtral, olmoe, qwen2_moe, qwen3_moe
from mocte_ds.convert.hf.families.family import FAMILIES, Family, Start, register
from mocte_ds.convert.hf.families.run import Mixture
from mocte_ds.convert.hf.families.tensors import Pair

__all__ = [
    "FAMILIES",
    "Family",
    "Mixture",
    "Pair",
    "Start",
    "deepseek_v3",
    "glm4_moe",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "register",
]
