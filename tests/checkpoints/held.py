"""A model in memory as the source of an export, so that tests need no checkpoint."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mocte_ds.base_model import base_facts
from mocte_ds.checkpoints.source import Source, empty_model
from mocte_ds.convert.hf.export import export_trained
from mocte_ds.moe import Block


class HeldSource(Source):
    """The weights of a model of transformers with its blocks, as they are now."""

    def __init__(self, model: nn.Module, dtype: str = "fp32") -> None:
        blocks = [m for m in model.modules() if isinstance(m, Block)]
        mocte = model.settings.to_dict() if blocks else None
        entries = [{"name": b.name, "mode": str(b.mode), "experts": []} for b in blocks]
        state = {"step": 0, "tokens": 0, "base": base_facts(model), "mocte": mocte, "blocks": entries}
        around = {"config": mocte, "blocks": entries} if blocks else None
        empty = empty_model(state["base"], around, Path("a model in memory"))
        super().__init__(empty, {**state, "tokenizer": None}, dtype)
        self._held = model.state_dict()

    def _stored(self, name: str) -> Tensor:
        return self._held[name]


def write(model: nn.Module, folder: Path, dtype: str = "fp32", choice: str = "auto") -> dict[str, Any]:
    """Facts of a model that was written to a folder and compared."""
    return export_trained(HeldSource(model), folder, dtype, choice=choice)
