"""The model of a run that goes on, in any script, as a Hugging Face folder."""

import sys
from pathlib import Path
from typing import Any

from torch import nn

from mocte_ds.base_model import base_facts, require_base
from mocte_ds.dist.collectives import from_rank_zero
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import CheckpointError, ConfigError, MocteError
from mocte_ds.zero.cut import shown_uncut
from mocte_ds.zero.gathered_weights import whole_weights


def export_run(
    engine: Any,
    folder: str | Path,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    choice: str = "auto",
) -> dict[str, Any]:
    """Gather all weights on rank zero, which writes and compares the folder (collective).

    Args:
        engine: of mocte_ds.initialize. Its module is a model of transformers, or holds one with all blocks (a
            LightningModule, a loss around it); what else it holds is left out.
        folder: as of :func:`mocte_ds.convert.hf.export.export`; on the machine of rank zero.
        dtype: as there; None: as it trains.
        tokenizer: as there.
        choice: as there.

    Returns:
        Facts, as there, on all ranks.

    Raises:
        CheckpointError, ConfigError: as there, on all ranks; the run can go on. Or a part of the model was replaced
            after it was made.

    Note:
        The other ranks wait for rank zero in a collective, at most as long as the process group's time-out.
    """
    try:  # importing mocte_ds must not import transformers, nor need what only conversions need
        from mocte_ds.convert.hf.export import TOOL, export_trained
        from mocte_ds.convert.hf.kept_tokenizer import run_tokenizer
        from mocte_ds.convert.hf.output_folder import require_free
        from mocte_ds.convert.hf.trained import GatheredSource
    except ModuleNotFoundError as error:
        raise ConfigError(f"engine.mocte.export needs {error.name}: pip install 'mocte-ds[hf]'.") from error
    prefix, model = _language_model(engine.module)
    base, rank = require_base(base_facts(model), "the run"), engine.mesh.world.rank
    state = _seen_from(prefix, engine.mocte.run.state_dict())
    out = Path(folder)
    failure: Exception | None = None
    if rank == 0:
        try:
            out = require_free(out, None, TOOL)
        except Exception as error:
            failure = error
    _agree(failure, engine.mesh.world)
    weights = whole_weights(engine.module, engine.mesh, engine.zero_optimization_partition_weights())
    facts: dict[str, Any] | None = None
    if weights is not None:
        try:
            inner = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
            source = GatheredSource(inner, base, state)
            _require_as_made(model, source.model, prefix)
            goes_along = None if tokenizer is None else run_tokenizer(tokenizer, None, out)
            facts = export_trained(source, out, dtype, goes_along, choice=choice)
        except Exception as error:  # the other ranks must not wait for ever
            failure = error
    _agree(failure, engine.mesh.world)
    return from_rank_zero(facts, engine.mesh.world)


def _language_model(module: nn.Module) -> tuple[str, nn.Module]:
    """The model of transformers that a module is or holds, and its path before it (with a dot at the end, or empty).

    Where there is none, or several side by side, the module itself.
    """
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None or isinstance(module, transformers.PreTrainedModel):
        return "", module
    theirs = transformers.PreTrainedModel
    found = {f"{name}.": part for name, part in module.named_modules() if isinstance(part, theirs)}
    outermost = [name for name in found if not any(name.startswith(other) for other in found.keys() - {name})]
    return (outermost[0], found[outermost[0]]) if len(outermost) == 1 else ("", module)


def _seen_from(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a run with the names that its blocks have in the model at ``prefix``.

    Raises:
        CheckpointError: a block lies elsewhere.
    """
    if not prefix:
        return state
    names = [entry["name"] for entry in state["blocks"]]
    outside = next((name for name in names if not name.startswith(prefix)), None)
    if outside is not None:
        raise CheckpointError(f"the block {outside} lies outside of the model of transformers, {prefix[:-1]}.")
    names = [name.removeprefix(prefix) for name in names]
    blocks = [{**entry, "name": name} for entry, name in zip(state["blocks"], names, strict=True)]
    return {**state, "config": {**state["config"], "modules": names}, "blocks": blocks}


def _require_as_made(model: nn.Module, made: nn.Module, prefix: str = "") -> None:
    """Refuse a model of which a part was replaced after it was made: the folder would compute something else.

    Args:
        model: that trains.
        made: of the same config, on the meta device.
        prefix: where the first one lies, which its blocks know.
    """
    found, expected = _parts(model, prefix), _parts(made)
    for name in {**found, **expected}:
        if found.get(name) != expected.get(name):
            raise CheckpointError(
                f"{name} is {found.get(name, 'missing')} in the model that trains, and "
                f"{expected.get(name, 'missing')} in one that is made of its config. A model that was changed after it "
                "was made cannot be exported; say the same in its config, or register a class of your own."
            )


def _parts(model: nn.Module, prefix: str = "") -> dict[str, str]:
    """Class and settings of each module, experts apart: each rank has its own."""
    parts = ((name, part) for name, part in model.named_modules() if ".banks" not in name)
    shown = {name: shown_uncut(part) for name, part in parts}
    return {name: text.replace(f"(name={prefix}", "(name=", 1) for name, text in shown.items()}


def _agree(failure: Exception | None, axis: Axis) -> None:
    """Raise on all ranks what rank zero has met (collective)."""
    told = isinstance(failure, MocteError) or failure is None
    found = from_rank_zero(failure if told else CheckpointError(f"{type(failure).__name__}: {failure}"), axis)
    if found is not None:
        raise failure or found
