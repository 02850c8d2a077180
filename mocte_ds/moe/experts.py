"""What an expert is: a copy of the dense FFN, or a narrow zero-initialised bypass beside it."""

import copy

import torch
from torch import nn

from mocte_ds.errors import ConfigError
from mocte_ds.moe.ffn_shape import FORMS, FFNSlice, ffn_shape, first_matrix, gives_slice, is_additive
from mocte_ds.remote_code.experts_mocte import in_out, resized


def feature_size(ffn: nn.Module, name: str) -> int:
    """Width d of the feature that an FFN reads.

    Raises:
        ConfigError: the module holds no matrix, so it is not an FFN.
    """
    shape = ffn_shape(ffn)
    if shape is not None:
        return shape.hidden_size
    matrix = first_matrix(ffn)
    if matrix is not None:
        return in_out(matrix)[0]
    raise ConfigError(
        f"mocte.modules matches {name} ({type(ffn).__name__}), which has no linear layer: it is not an FFN."
    )


def make_expert(
    ffn: nn.Module,
    kind: str,
    width: int | None,
    num_experts: int,
    name: str,
    part: FFNSlice | None = None,
    redrawn: bool = False,
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
        redrawn: whether hidden units of it will be drawn anew.

    Raises:
        ConfigError: a narrower or redrawn expert of an FFN that cannot be cut by hidden units, or banks that do not
            divide its width.
    """
    expert, part, shape = copy.deepcopy(ffn), part or FFNSlice(), ffn_shape(ffn)
    if kind == "ffn" and part.count == 1:
        if redrawn and (shape is None or not is_additive(ffn, shape)):
            raise ConfigError(
                f"mocte.expert.redraw cannot draw hidden units of {name} ({type(ffn).__name__}), whose linear layers "
                f"have none of these forms: {FORMS}. Use 0."
            )
        return expert
    if shape is None:
        raise _no_narrow(ffn, name, f"whose linear layers have none of these forms: {FORMS}")
    if not is_additive(ffn, shape):
        raise _no_narrow(
            ffn, name, "whose hidden units do not each add a part of their own (a norm or a residual inside?)"
        )
    if kind == "ffn":
        if shape.width % part.count:
            raise ConfigError(f"{part.count} mocte.banks do not divide the {shape.width} hidden units of {name}.")
        narrow = shape.width // part.count
    else:
        narrow = width or max(1, shape.width // num_experts // part.count)
    for path in shape.inputs:
        wide = resized(ffn.get_submodule(path), outputs=2 * narrow if shape.fused else narrow)
        expert.set_submodule(path, wide)
    output = resized(ffn.get_submodule(shape.output), inputs=narrow)
    for parameter in output.parameters():
        nn.init.zeros_(parameter)
    expert.set_submodule(shape.output, output)
    if kind == "ffn":
        copy_slice(ffn, expert, part)
        if not gives_slice(ffn, shape, expert, part):
            raise _no_narrow(ffn, name, "whose linear layers compute something else than torch's with fewer outputs")
    else:
        draw_bypass(expert, 0)
    return expert


def _no_narrow(ffn: nn.Module, name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"mocte.expert.kind 'lora' and several banks cannot narrow {name} ({type(ffn).__name__}), {reason}. Use kind "
        "'ffn' and one bank."
    )


@torch.no_grad()
def copy_slice(ffn: nn.Module, expert: nn.Module, part: FFNSlice) -> None:
    """Give an `ffn` expert the FFN's weights, or its bank's slice of them."""
    weights = dict(ffn.named_parameters())
    for name, parameter in expert.named_parameters():
        parameter.copy_(part.cut(ffn, name, weights[name]))


@torch.no_grad()
def draw_bypass(expert: nn.Module, seed: int) -> None:
    """Draw the matrices with which a `lora` expert reads the feature, as a new layer of their class would.

    On the CPU in fp32, so that devices and types do not change the draw.

    Args:
        expert: made by :func:`make_expert`.
        seed: another seed gives unrelated matrices.
    """
    generator, shape = torch.Generator().manual_seed(seed), ffn_shape(expert)
    assert shape is not None  # make_expert narrows no other module
    for matrix in (expert.get_submodule(path) for path in shape.inputs):
        bound = in_out(matrix)[0] ** -0.5
        if isinstance(matrix, nn.Linear):
            for parameter in matrix.parameters():
                uniform = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(uniform)
        else:
            matrix.weight.copy_(torch.empty(matrix.weight.shape).normal_(std=bound, generator=generator))
