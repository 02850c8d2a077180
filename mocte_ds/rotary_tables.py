"""Tables of rotary positions, which must not be rounded with a model's weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

_ENDS = "inv_freq"
"""How transformers name them."""


@contextlib.contextmanager
def kept_in_fp32(model: nn.Module) -> Iterator[None]:
    """Within it a model may be rounded, as DeepSpeed does for bf16 and fp16; its tables are as before at the end.

    Frequencies in bf16 turn the token at position 255 by up to 0.1 radian too much or too little, and what is exported,
    which has exact ones, would be another model than the trained one.

    Args:
        model: whose tables are buffers that no checkpoint holds.
    """
    tables = [
        (part, name, table.clone())
        for part in model.modules()
        for name, table in part.named_buffers(recurse=False)
        if name.endswith(_ENDS) and name in part._non_persistent_buffers_set and table.dtype is torch.float32
    ]
    yield
    for part, name, table in tables:
        setattr(part, name, table.to(getattr(part, name).device))
