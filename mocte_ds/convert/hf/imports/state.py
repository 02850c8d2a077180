"""What a checkpoint of step 0 says of a model, beside its weights."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mocte_ds.config import MocteConfig
from mocte_ds.models import DecoderConfig
from mocte_ds.moe.block import BlockMode, ExpertMode


def start_state(decoder: DecoderConfig, config: MocteConfig | None = None, names: Sequence[str] = ()) -> dict[str, Any]:
    """The state of a source of step 0 whose experts train from the beginning on.

    Args:
        decoder: its sizes.
        config: "mocte" block; None: a dense model.
        names: of the blocks.
    """
    experts = config.num_experts * len(config.routers) if config else 0
    modes = {"mode": BlockMode.SPECIALISING.value, "experts": [ExpertMode.TRAINING.value] * experts}
    return {
        "step": 0,
        "tokens": 0,
        "model": asdict(decoder),
        "tokenizer": None,
        "mocte": config.to_dict() if config else None,
        "blocks": [{"name": name, **modes} for name in names],
    }
