"""The model of a run that goes on, in any script, as a Hugging Face folder."""

from pathlib import Path
from typing import Any

from torch import nn

from mocte_ds.base_model import base_facts, require_base
from mocte_ds.dist.collectives import from_rank_zero
from mocte_ds.dist.mesh import Axis
from mocte_ds.errors import CheckpointError, ConfigError, MocteError
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
        engine: of mocte_ds.initialize.
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
    base, rank = require_base(base_facts(engine.module), "the run"), engine.mesh.world.rank
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
            source = GatheredSource(weights, base, engine.mocte.run.state_dict())
            _require_as_made(engine.module, source.model)
            goes_along = None if tokenizer is None else run_tokenizer(tokenizer, None, out)
            facts = export_trained(source, out, dtype, goes_along, choice=choice)
        except Exception as error:  # the other ranks must not wait for ever
            failure = error
    _agree(failure, engine.mesh.world)
    return from_rank_zero(facts, engine.mesh.world)


def _require_as_made(model: nn.Module, made: nn.Module) -> None:
    """Refuse a model of which a part was replaced after it was made: the folder would compute something else.

    Args:
        model: that trains.
        made: of the same config, on the meta device.
    """
    found, expected = _parts(model), _parts(made)
    for name in {**found, **expected}:
        if found.get(name) != expected.get(name):
            raise CheckpointError(
                f"{name} is {found.get(name, 'missing')} in the model that trains, and "
                f"{expected.get(name, 'missing')} in one that is made of its config. A model that was changed after it "
                "was made cannot be exported; say the same in its config, or register a class of your own."
            )


def _parts(model: nn.Module) -> dict[str, str]:
    """Class and settings of each module, experts apart: each rank has its own."""
    parts = ((name, part) for name, part in model.named_modules() if ".banks" not in name)
    return {name: f"{type(part).__name__}({part.extra_repr()})" for name, part in parts}


def _agree(failure: Exception | None, axis: Axis) -> None:
    """Raise on all ranks what rank zero has met (collective)."""
    told = isinstance(failure, MocteError) or failure is None
    found = from_rank_zero(failure if told else CheckpointError(f"{type(failure).__name__}: {failure}"), axis)
    if found is not None:
        raise failure or found
