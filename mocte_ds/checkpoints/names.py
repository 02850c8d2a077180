"""Names of the files that DeepSpeed's engines write into a checkpoint."""

import re
from collections.abc import Container

MODEL_FILE = "mp_rank_00_model_states.pt"
PARTITIONED_MODEL_FILE = "zero_pp_rank_0_mp_rank_00_model_states.pt"
"""The same under ZeRO stage 3 (docs/zero3.md)."""
EXPERT_FILE = "layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"
"""Weights of one expert, counted within its bank; the layer counts the banks in the order of the model."""
OPTIMIZER_FILE = "{precision}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
"""A rank's part of the master weights and moments; the precision is `bf16_` or nothing."""

CONVERTERS_FILE = "USE_mocte-ds_zero_to_fp32_INSTEAD_model_states.pt"
"""In a checkpoint with experts, which DeepSpeed's zero_to_fp32 cannot read: it stops here and shows the name."""

EXPERT_NAME = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt")
OPTIMIZER_NAME = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
EXPERT_PARAMETER = re.compile(r"(.+)\.banks\.(\d+)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.+)")
"""Path of an expert's parameter: block, bank, number, and its name in the expert."""


def is_gate(name: str) -> bool:
    """Whether a tensor is part of one of our gates, which keep their precision; a base model may have gates too."""
    return ".deepspeed_moe.gate." in name


def expert_parameter(block: str, bank: int, number: int, name: str) -> str:
    """Path of an expert's parameter; what :data:`EXPERT_PARAMETER` takes apart."""
    return f"{block}.banks.{bank}.deepspeed_moe.experts.deepspeed_experts.{number}.{name}"


def renumbered(name: str, by: int) -> str:
    """A parameter's path with the number of its expert raised; other paths as they are."""
    found = EXPERT_PARAMETER.fullmatch(name)
    return expert_parameter(found[1], int(found[2]), int(found[3]) + by, found[4]) if found else name


def model_file(names: Container[str]) -> str:
    """Name of the file of a checkpoint that holds everything but the experts, among the names of all."""
    return PARTITIONED_MODEL_FILE if PARTITIONED_MODEL_FILE in names else MODEL_FILE
