"""Runs lm-evaluation-harness on an exported folder, on one process or many, with the tasks that ship here."""

import contextlib
import difflib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from mocte_ds.dist.collectives import gather_objects, gather_rows, world
from mocte_ds.errors import CheckpointError, ConfigError

TASKS = Path(__file__).parent / "tasks"


def offline_tasks() -> dict[str, dict[str, Any]]:
    """The tasks that ship with the package: name -> its YAML."""
    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(TASKS.glob("*.yaml"))}


def evaluate(
    model_dir: str | Path,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate a model (collective where several ranks run).

    Args:
        model_dir: Hugging Face folder with model and tokenizer.
        tasks: names of shipped tasks, or of tasks in ``include_path``.
        limit: items of each task; None: all.
        batch_size: sequences of a forward.
        device: torch device; None: the GPU of this rank, else the CPU.
        num_fewshot: examples before each question; None: the task's own number.
        include_path: folder with more lm-eval task files.
        seed: of the few-shot examples.

    Returns:
        On rank 0: {"model", "tasks": {name: {"metric": value, "metric_stderr": ..., "items": n, "chance": ...}},
        "ranks", "limit", "lm_eval": its version}; on other ranks {}.

    Raises:
        CheckpointError: no model in the folder, or one that cannot be loaded.
        ConfigError: an unknown task; names the nearest ones.
    """
    folder = Path(model_dir)
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is no exported model: {name} is missing; tools/export_hf.py makes one.")
    known = offline_tasks()
    if include_path is None:
        for task in tasks:
            if task not in known:
                near = difflib.get_close_matches(task, known, n=2, cutoff=0.3)
                raise ConfigError(
                    f"task '{task}' does not ship with mocte-ds; nearest: {near or 'none'}; all: {sorted(known)}. "
                    "--include-path takes a folder with more lm-eval tasks."
                )
    # No hub can be reached from most compute nodes, and waiting for one takes minutes.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    rank, size = world()
    with _task_folder() as shipped, tempfile.TemporaryDirectory() as cache:
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        folders = [shipped] + ([str(include_path)] if include_path else [])
        manager = TaskManager(include_path=folders, include_defaults=False)
        model = _model(folder, batch_size, device, rank, size)
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            limit=limit,
            num_fewshot=num_fewshot,
            task_manager=manager,
            bootstrap_iters=1000,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            log_samples=False,
        )
        model.barrier()
    if rank != 0:
        return {}
    results = {}
    for task in tasks:
        values = {}
        for key, value in found["results"][task].items():
            metric, _, _ = key.partition(",")
            if isinstance(value, int | float) and metric not in ("alias", "sample_len"):
                values[metric] = value
        counts = found.get("n-samples", {}).get(task, {})
        chance = (known.get(task, {}).get("metadata") or {}).get("chance")
        results[task] = {**values, "items": counts.get("effective"), "chance": chance}
    return {"model": str(folder), "tasks": results, "ranks": size, "limit": limit, "lm_eval": lm_eval.__version__}


@contextlib.contextmanager
def _task_folder() -> Iterator[str]:
    """The shipped task files with the folder of their data filled in, for as long as they are needed."""
    with tempfile.TemporaryDirectory() as folder:
        for path in TASKS.glob("*.yaml"):
            text = path.read_text(encoding="utf-8").replace("@TASKS@", str(TASKS))
            Path(folder, path.name).write_text(text, encoding="utf-8")
        yield folder


def _model(folder: Path, batch_size: int, device: str | None, rank: int, size: int) -> Any:
    """lm-eval's Hugging Face model, with its share of the items where several ranks run."""
    from lm_eval.models.huggingface import HFLM

    class RankedLM(HFLM):
        """HFLM whose ranks exchange results through torch.distributed."""

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            return gather_rows(tensor.reshape(1, -1)).reshape(-1) if size > 1 else tensor

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
            values = gather_objects(obj)
            return values if rank == dst else None

        def barrier(self) -> None:
            if size > 1:
                dist.barrier()

    if device is None:
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        # Nothing is fetched, and no code from the folder runs.
        only = {"local_files_only": True, "trust_remote_code": False}
        network = AutoModelForCausalLM.from_pretrained(folder, **only).to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder, **only)
    except Exception as error:  # transformers raises many types for a damaged folder
        text = str(error).splitlines()[0] if str(error) else ""
        raise CheckpointError(f"{folder} cannot be loaded: {type(error).__name__}: {text}") from error
    model = RankedLM(pretrained=network, tokenizer=tokenizer, batch_size=batch_size, device=device)
    model._rank, model._world_size = rank, size
    return model


def table(results: dict[str, Any]) -> str:
    """The results as lines to read: task, items, metric, value, standard error, chance."""
    lines = [f"{'task':<28}{'items':>6}  {'metric':<12}{'value':>8}{'stderr':>9}{'chance':>8}"]
    for task, values in results["tasks"].items():
        chance = values.get("chance")
        for metric, value in values.items():
            if metric in ("items", "chance") or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr")
            right = f"{error:>9.4f}" if isinstance(error, float) else f"{'-':>9}"
            floor = f"{chance:>8.2f}" if chance is not None else f"{'-':>8}"
            lines.append(f"{task:<28}{values['items'] or 0:>6}  {metric:<12}{value:>8.4f}{right}{floor}")
    return "\n".join(lines)
