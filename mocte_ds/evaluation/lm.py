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

from mocte_ds.dist.collectives import gather_objects, gather_rows, world
from mocte_ds.errors import ConfigError
from mocte_ds.evaluation.network import load_network
from mocte_ds.evaluation.results import collect, table
from mocte_ds.shown import one_line
from mocte_ds.yaml_files import read_yaml

__all__ = ["evaluate", "offline_tasks", "table"]

TASKS = Path(__file__).parent / "tasks"


def offline_tasks() -> dict[str, dict[str, Any]]:
    """The tasks that ship with the package: name -> its YAML."""
    return {path.stem: read_yaml(path) for path in sorted(TASKS.glob("*.yaml"))}


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
        On rank 0: {"model", "tasks": see :func:`mocte_ds.evaluation.results.collect`, "ranks", "limit", "lm_eval": its
        version}; on other ranks {}.

    Raises:
        CheckpointError: no model in the folder, or one that is damaged, changed or cannot be loaded.
        ConfigError: an unknown task (names the nearest ones), one of ``include_path`` that fails, or a number of items
            that makes no sense.
    """
    folder = Path(model_dir)
    _require_counts(tasks, limit, batch_size, num_fewshot)
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
        model = _model(folder, batch_size, device, rank, size)
        try:
            manager = TaskManager(include_path=folders, include_defaults=False)
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=list(dict.fromkeys(tasks)),
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
        except Exception as error:  # tasks are programs of others and fail in every way
            if include_path is None:
                raise
            raise ConfigError(
                f"lm-eval could not run {', '.join(tasks)} with the task files of {include_path}: "
                f"{type(error).__name__}: {one_line(error)}. Mend the task file, or leave the task out."
            ) from error
        model.barrier()
    if rank != 0:
        return {}
    chances = {name: (task.get("metadata") or {}).get("chance") for name, task in known.items()}
    results = collect(found, chances)
    return {"model": str(folder), "tasks": results, "ranks": size, "limit": limit, "lm_eval": lm_eval.__version__}


def _require_counts(tasks: Sequence[str], limit: int | None, batch_size: int, num_fewshot: int | None) -> None:
    """Raise ConfigError for numbers that make no evaluation."""
    if not tasks:
        raise ConfigError(f"no task is named; these ship with mocte-ds: {sorted(offline_tasks())}.")
    for name, value, least in (("limit", limit, 1), ("batch_size", batch_size, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{name} = {value} must be {least} or more.")


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

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            """HFLM puts the token that begins a text in front itself: the tokenizer must not do so a second time."""
            kept, self.add_bos_token = self.add_bos_token, False
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm)
            finally:
                self.add_bos_token = kept

    if device is None:
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    network, tokenizer = load_network(folder)
    model = RankedLM(pretrained=network.to(device), tokenizer=tokenizer, batch_size=batch_size, device=device)
    model._rank, model._world_size = rank, size
    return model
