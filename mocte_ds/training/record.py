"""run.json: what a run is made of."""

from dataclasses import asdict
from typing import Any

from mocte_ds.config import MocteConfig
from mocte_ds.logs.run_facts import start_facts
from mocte_ds.secret_keys import without_secrets
from mocte_ds.training.changes import changes_so_far
from mocte_ds.training.model import model_facts
from mocte_ds.training.start import Start


def run_record(start: Start, config: MocteConfig | None, parameters: int, ranks: int) -> dict[str, Any]:
    """Content of run.json in the run's folder.

    Args:
        start: of the run.
        config: its "mocte" block; None: the run is dense.
        parameters: of the whole model.
        ranks: of the run.
    """
    run, changes = start.run, changes_so_far(start.out / "run.json", start.step)
    if start.changes.facts:
        changes.append({"step": start.step, **start.changes.facts})
    mocte = {"mocte": config.to_dict()} if config else {}
    return {
        **start_facts(ranks),
        "model": model_facts(run.model),
        "parameters": parameters,
        "data": {**asdict(run.data), "manifest_sha256": start.manifest.sha256, "domains": start.manifest.domains},
        "training": {**asdict(run.training), "context": run.context, "warmup_steps": run.warmup_steps},
        "evaluation": asdict(run.evaluation),
        "watch": asdict(run.watch),
        "deepspeed": {**without_secrets(start.settings), **mocte},
        "changes": changes,
    }
