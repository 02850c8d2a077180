"""A model in memory as the source of an export, so that tests need no checkpoint."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mocte_ds.checkpoints.source import Source
from mocte_ds.convert.hf.compare import compare
from mocte_ds.convert.hf.dense import Layout, SpecialIds
from mocte_ds.convert.hf.export import write_model
from mocte_ds.convert.hf.layouts import choose_layout
from mocte_ds.moe import Block

NONE = SpecialIds(None, None, None)


class HeldSource(Source):
    """The weights of a decoder with its blocks, as they are now."""

    def __init__(self, model: nn.Module, dtype: str = "fp32") -> None:
        eod = next((m.context.eod_id for m in model.modules() if isinstance(m, Block)), None)
        super().__init__(model, {"mocte": {"eod_id": eod}}, dtype)

    def _stored(self, name: str) -> Tensor:
        return self.model.state_dict()[name]


def stored(
    model: nn.Module, folder: Path, dtype: str = "fp32", special: SpecialIds = NONE, choice: str = "auto"
) -> tuple[HeldSource, Layout]:
    """A model written to a folder: what it was and what it became."""
    source = HeldSource(model, dtype)
    layout = choose_layout(source, special, choice)
    write_model(source, layout, folder)
    return source, layout


def facts_of(model: nn.Module, folder: Path, choice: str = "auto") -> dict[str, Any]:
    """Write a model and compare it."""
    return compare(*stored(model, folder, choice=choice), folder)[0]
