"""What an expert is: a copy of the dense FFN, or a narrow zero-initialised bypass beside it."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mocte_ds.errors import ConfigError

# Attribute names of the matrices of an FFN, inputs first, in the models that we know: Llama-like (ours, Llama, Mistral,
# Qwen2, ...), GPT-2-like (ours, GPT-2, GPT-NeoX) and OPT-like.
_KNOWN_SHAPES = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("fc1",), "fc2"),
)


@dataclass(frozen=True)
class FFNShape:
    """Where the matrices of an FFN are and how large they are."""

    inputs: tuple[str, ...]
    """Attributes of the matrices that read the feature (two for a gated FFN)."""
    output: str
    """Attribute of the matrix that writes the output."""
    hidden_size: int
    """Width d of the feature."""
    width: int
    """Hidden units f."""


def ffn_shape(ffn: nn.Module) -> FFNShape | None:
    """Shape of an FFN of a known form, else None.

    Args:
        ffn: any module; its matrices may be nn.Linear or transformers' Conv1D (whose weight is stored transposed).
    """
    for inputs, output in _KNOWN_SHAPES:
        matrices = [getattr(ffn, name, None) for name in (*inputs, output)]
        if all(_is_matrix(matrix) for matrix in matrices):
            hidden_size, width = _in_out(matrices[0])
            return FFNShape(inputs, output, hidden_size, width)
    return None


def feature_size(ffn: nn.Module, name: str) -> int:
    """Width d of the feature that an FFN reads.

    Raises:
        ConfigError: the module holds no matrix, so it is no FFN.
    """
    shape = ffn_shape(ffn)
    if shape is not None:
        return shape.hidden_size
    for module in ffn.modules():
        if _is_matrix(module):
            return _in_out(module)[0]
    raise ConfigError(
        f"mocte.modules matches {name} ({type(ffn).__name__}), which has no linear layer: it is not an FFN."
    )


@dataclass(frozen=True)
class Part:
    """Which slice of an FFN's hidden units a bank's experts take over."""

    number: int = 0
    """From 0."""
    count: int = 1
    """Slices, equally wide."""

    def cut(self, ffn: nn.Module, name: str, value: Tensor) -> Tensor:
        """The slice of a tensor of the FFN: a parameter, or what the optimizer keeps of it.

        The slices' outputs add up to the FFN's: the output's bias goes to the first.

        Args:
            ffn: the dense FFN.
            name: of its parameter, e.g. `up_proj.weight`.
            value: of that parameter's shape.
        """
        if self.count == 1:
            return value
        shape, (attribute, _, kind) = ffn_shape(ffn), name.rpartition(".")
        width = shape.width // self.count
        units = slice(self.number * width, (self.number + 1) * width)
        rows_are_outputs = isinstance(getattr(ffn, attribute), nn.Linear)  # Conv1D is stored transposed
        if attribute == shape.output:
            if kind == "bias":
                return value if self.number == 0 else torch.zeros_like(value)
            return value[:, units] if rows_are_outputs else value[units]
        return value[units] if kind == "bias" or rows_are_outputs else value[:, units]


def make_expert(
    ffn: nn.Module, kind: str, width: int | None, num_experts: int, name: str, part: Part | None = None
) -> nn.Module:
    """One expert, before it is copied to the slots of a block.

    Args:
        ffn: the block's dense FFN.
        kind: `ffn` (a copy, so that emergence does not change the function) or `lora` (a narrow FFN of the same form
            whose output matrix is zero, so that it adds nothing at birth; see :func:`draw_bypass`).
        width: hidden units of a `lora` expert; None: the FFN's width / num_experts / banks, at least 1.
        num_experts: E.
        name: the block's name, for messages.
        part: the bank's slice of an `ffn`; None: all of it.

    Raises:
        ConfigError: a narrower expert of an FFN whose form is not known, or banks that do not divide its width.
    """
    expert, part = copy.deepcopy(ffn), part or Part()
    if kind == "ffn" and part.count == 1:
        return expert
    shape = ffn_shape(ffn)
    if shape is None:
        known = "; ".join(f"{', '.join(i)}, {o}" for i, o in _KNOWN_SHAPES)
        raise ConfigError(
            f"mocte.expert.kind 'lora' and several banks cannot narrow {name} ({type(ffn).__name__}): its matrices are "
            f"none of: {known}. Use kind 'ffn' and one bank."
        )
    if kind == "ffn":
        if shape.width % part.count:
            raise ConfigError(f"{part.count} mocte.banks do not divide the {shape.width} hidden units of {name}.")
        narrow = shape.width // part.count
    else:
        narrow = width or max(1, shape.width // num_experts // part.count)
    for attribute in shape.inputs:
        setattr(expert, attribute, _resized(getattr(ffn, attribute), outputs=narrow))
    output = _resized(getattr(ffn, shape.output), inputs=narrow)
    for parameter in output.parameters():
        nn.init.zeros_(parameter)
    setattr(expert, shape.output, output)
    if kind == "ffn":
        copy_slice(ffn, expert, part)
    else:
        draw_bypass(expert, 0)
    return expert


@torch.no_grad()
def copy_slice(ffn: nn.Module, expert: nn.Module, part: Part) -> None:
    """Give an `ffn` expert the FFN's weights, or its bank's slice of them."""
    weights = dict(ffn.named_parameters())
    for name, parameter in expert.named_parameters():
        parameter.copy_(part.cut(ffn, name, weights[name]))


@torch.no_grad()
def draw_bypass(expert: nn.Module, seed: int) -> None:
    """Draw the matrices with which a `lora` expert reads the feature, as a fresh layer of their class has them.

    On the CPU in fp32, so that devices and types do not change the draw.

    Args:
        expert: made by :func:`make_expert`.
        seed: another seed gives unrelated matrices.
    """
    generator, shape = torch.Generator().manual_seed(seed), ffn_shape(expert)
    for matrix in (getattr(expert, name) for name in shape.inputs):
        bound = _in_out(matrix)[0] ** -0.5
        if isinstance(matrix, nn.Linear):
            for parameter in matrix.parameters():
                uniform = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(uniform)
        else:
            matrix.weight.copy_(torch.empty(matrix.weight.shape).normal_(std=bound, generator=generator))


def _is_matrix(module: object) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2
    )


def _in_out(matrix: nn.Module) -> tuple[int, int]:
    rows, columns = matrix.weight.shape
    return (columns, rows) if isinstance(matrix, nn.Linear) else (rows, columns)


def _resized(matrix: nn.Module, inputs: int | None = None, outputs: int | None = None) -> nn.Module:
    """A fresh matrix of the same class with another number of inputs or outputs, still to be filled."""
    old_inputs, old_outputs = _in_out(matrix)
    n_in, n_out = inputs or old_inputs, outputs or old_outputs
    like = {"device": matrix.weight.device, "dtype": matrix.weight.dtype}
    if isinstance(matrix, nn.Linear):
        return nn.Linear(n_in, n_out, bias=matrix.bias is not None, **like)
    return type(matrix)(n_out, n_in).to(**like)
