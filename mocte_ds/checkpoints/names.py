"""Names of the files that DeepSpeed's engines write into a checkpoint."""

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass

_PART = "mp_rank_"


@dataclass(frozen=True)
class FileNames:
    """What the files of one tensor-parallel rank are called."""

    model: str
    """Everything but the experts, at ZeRO stages 1 and 2."""
    partitioned_model: str
    """The same under ZeRO stage 3, by `rank` (docs/zero3.md)."""
    expert: str
    """Weights of one `expert`, counted within its bank; `layer` counts the banks in the order of the model."""
    optimizer: str
    """The part of a `rank` of the master weights and moments; `precision` is `bf16_` or nothing."""


def file_names(tensor_rank: int) -> FileNames:
    """Names as DeepSpeed's engines give them, with fields in braces.

    Args:
        tensor_rank: of the mesh's tensor axis.
    """
    part = f"{_PART}{tensor_rank:02d}"
    return FileNames(
        model=f"{part}_model_states.pt",
        partitioned_model=f"zero_pp_rank_{{rank}}_{part}_model_states.pt",
        expert=f"layer_{{layer}}_expert_{{expert}}_{part}_model_states.pt",
        optimizer=f"{{precision}}zero_pp_rank_{{rank}}_{part}_optim_states.pt",
    )


# Of a model that tensor parallelism has not cut, which is what tools read; a folder with other names is refused.
_UNCUT = file_names(0)
MODEL_FILE, EXPERT_FILE, OPTIMIZER_FILE = _UNCUT.model, _UNCUT.expert, _UNCUT.optimizer
PARTITIONED_MODEL_FILE = _UNCUT.partitioned_model.format(rank=0)

CONVERTERS_FILE = "USE_mocte-ds_zero_to_fp32_INSTEAD_model_states.pt"
"""In a checkpoint with experts, which DeepSpeed's zero_to_fp32 cannot read: it stops here and shows the name."""

EXPERT_NAME = re.compile(EXPERT_FILE.replace(".", r"\.").format(layer=r"(\d+)", expert=r"(\d+)"))
OPTIMIZER_NAME = re.compile(OPTIMIZER_FILE.replace(".", r"\.").format(precision="(bf16_)?", rank=r"(\d+)"))
EXPERT_PARAMETER = re.compile(r"(.+)\.banks\.(\d+)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.+)")
"""Path of an expert's parameter: block, bank, number, and its name in the expert."""


def _of_any_tensor_rank(template: str, **fields: str) -> re.Pattern:
    pattern = template.replace(".", r"\.").format(**fields)
    return re.compile(pattern.replace(f"{_PART}00", rf"{_PART}(?P<tensor>\d+)"))


_ANY_MODEL = _of_any_tensor_rank(MODEL_FILE)
_ANY_EXPERT = _of_any_tensor_rank(EXPERT_FILE, layer=r"(?P<layer>\d+)", expert=r"(?P<expert>\d+)")
_ANY_OPTIMIZER = _of_any_tensor_rank(OPTIMIZER_FILE, precision="(bf16_)?", rank=r"\d+")


def tensor_ranks_of(files: Iterable[str]) -> int:
    """Ranks that matrices are cut over in a checkpoint, by the names of its files."""
    found = [int(match["tensor"]) for match in map(_ANY_OPTIMIZER.fullmatch, files) if match]
    return max(found, default=0) + 1


def is_other_cut(file: str) -> bool:
    """Whether it is the name that DeepSpeed gives the model's file on another tensor rank than the first."""
    match = _ANY_MODEL.fullmatch(file)
    return bool(match and int(match["tensor"]))


def uncut_expert_file(file: str) -> str:
    """Name of an expert's file, which no tensor rank has cut; other names as they are."""
    match = _ANY_EXPERT.fullmatch(file)
    return EXPERT_FILE.format(layer=match["layer"], expert=match["expert"]) if match else file


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
