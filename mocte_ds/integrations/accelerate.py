"""accelerate's own ways to save a model know of no blocks: with blocks they raise, and name the one that does."""

import functools
import sys
from typing import Any

from torch import nn

from mocte_ds.errors import CheckpointError

_MARK = "_refuses_blocks"


def refuse_partial_state_dicts() -> None:
    """Let ``Accelerator.get_state_dict`` raise for a model with blocks, and with it ``Accelerator.save_model``.

    It would give the experts of one rank (all under ZeRO stage 3) under names that transformers pass over when they
    load them. The method of the class is replaced, once, if accelerate has been imported; for any other model it is
    accelerate's own.
    """
    module = sys.modules.get("accelerate.accelerator")
    cls: Any = getattr(module, "Accelerator", None)
    if cls is None or hasattr(cls.get_state_dict, _MARK):
        return
    stock = cls.get_state_dict

    @functools.wraps(stock)
    def get_state_dict(self: Any, model: nn.Module, *args: Any, **given: Any) -> Any:
        if _has_blocks(model):
            raise CheckpointError(
                "accelerator.get_state_dict and save_model of a model with blocks would give a part of it: its experts "
                "lie on all ranks, under names of their own. Call engine.mocte.export(FOLDER) on all ranks for a "
                "folder that AutoModelForCausalLM loads, or engine.save_16bit_model(FOLDER) for all weights."
            )
        return stock(self, model, *args, **given)

    setattr(get_state_dict, _MARK, True)
    cls.get_state_dict = get_state_dict


def _has_blocks(model: nn.Module) -> bool:
    from mocte_ds.moe.block import Block

    return any(isinstance(part, Block) for part in model.modules())
