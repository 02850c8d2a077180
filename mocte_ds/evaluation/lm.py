"""Runs lm-evaluation-harness on an exported folder or a run's checkpoint, on one process or many."""

import contextlib
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mocte_ds.checkpoints.place import is_checkpoint
from mocte_ds.errors import ConfigError, MocteError
from mocte_ds.evaluation.benchmarks import Benchmarks
from mocte_ds.evaluation.results import collect, table
from mocte_ds.evaluation.selection import chances, manager, matching, offline_tasks, select
from mocte_ds.evaluation.task_files import task_files
from mocte_ds.evaluation.texts import score_corpus
from mocte_ds.shown import one_line

__all__ = ["evaluate", "offline_tasks", "table"]

_WARNED = "lm_eval.models.huggingface"
_HUB = "data of the hub"


def evaluate(
    model_dir: str | Path,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    seed: int = 0,
    offline: str | Path | None = None,
    run_code: bool = False,
    chat_template: bool = False,
    model_args: dict[str, Any] | None = None,
    texts: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate a model (collective where several ranks run).

    Args:
        model_dir: Hugging Face folder with model and tokenizer, or a run's folder of checkpoints, or one of them.
        tasks: names of shipped tasks, of tasks in ``include_path`` and of lm-eval's own, also its groups, tags and
            patterns; `mocte-core` for 15 of these. No network is used for shipped ones.
        limit: items of each task; None: all.
        batch_size: sequences of a forward.
        device: torch device; None: the GPU of this rank, else the CPU.
        num_fewshot: examples before each question; None: the task's own number.
        include_path: folder with more lm-eval task files.
        seed: of the few-shot examples.
        offline: folder that tools/get_benchmarks.py has filled, in place of a network.
        run_code: whether programs that the model writes may run, as HumanEval has it.
        chat_template: whether questions are put as the tokenizer's template of a conversation has it.
        model_args: of :class:`mocte_ds.evaluation.harness_models.MocteLM`, for a checkpoint.
        texts: a corpus (a file for each domain) whose texts are scored, `limit` of each domain.

    Returns:
        On rank 0: {"model", "tasks": see :func:`mocte_ds.evaluation.results.collect`, "ranks", "limit", "lm_eval": its
        version, "notes": what a reader of the scores should know, and with ``texts`` "texts": see
        :func:`mocte_ds.evaluation.texts.score_texts`}; on other ranks {}.

    Raises:
        CheckpointError: no model in the folder, or one that is damaged, changed or cannot be loaded.
        ConfigError: an unknown task (names the nearest ones), one that fails or whose data are not there, or a number
            of items that makes no sense.
        DataError: the texts, or data of a task, cannot be read.
    """
    folder = Path(model_dir)
    if not tasks and texts is None:
        raise ConfigError(f"no task is named; these ship with mocte-ds: {sorted(offline_tasks())}.")
    _require_counts(limit, batch_size, num_fewshot)
    benchmarks = None if offline is None else Benchmarks(offline)
    selection = select(tasks, include_path, run_code)
    online = benchmarks is None and not selection.shipped
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if not online:
        # No hub can be reached from most compute nodes, and waiting for one takes minutes.
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    import datasets
    import lm_eval

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    with contextlib.ExitStack() as stack:
        shipped, cache = stack.enter_context(_task_folder()), stack.enter_context(tempfile.TemporaryDirectory())
        if not online:
            datasets.config.HF_DATASETS_CACHE = Path(cache)
        model = _model(folder, batch_size, device, model_args or {})
        if selection.names and limit is not None and limit < model.replicas.count:
            raise ConfigError(
                f"limit = {limit}: {model.replicas.count} ranks share the items; give as many, or fewer ranks."
            )
        if benchmarks is not None:
            stack.enter_context(benchmarks.serving())
        warned = stack.enter_context(_warnings())
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # lm-eval prints what it does
        # First: a corpus that cannot be read costs no scores.
        scored = {} if texts is None else {"texts": score_corpus(model, texts, limit, batch_size)}
        own = [] if include_path is None else [str(include_path)]
        tasks_of = manager([shipped, *selection.folders, *own], selection.everything, num_fewshot)
        if selection.names:
            names = matching(selection.names, tasks_of)
            where = f"the task files of {include_path}" if include_path else offline and f"the data in {offline}"
            with _refusing(names, where or (_HUB if online else None)):
                found = lm_eval.simple_evaluate(
                    model=model,
                    tasks=names,
                    limit=limit,
                    num_fewshot=num_fewshot,
                    task_manager=tasks_of,
                    bootstrap_iters=1000,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                    log_samples=False,
                    apply_chat_template=chat_template,
                    confirm_run_unsafe_code=run_code,
                )
        else:
            found = {"results": {}}
        model.barrier()
    world = model.replicas.world
    if world.rank != 0:
        return {}
    notes = [f"{name} was left out: {why}" for name, why in selection.left_out.items()]
    if model.capped:
        most = f"{model.max_length // 2} tokens, half of the model's context"
        notes.append(f"{model.capped} answers were allowed fewer tokens than their task allows: {most}")
    if warned:
        notes.append(f"{len(warned)} prompts or batches were cut to the model's context of {model.max_length} tokens")
    results = collect(found, chances(tasks_of.loaded, limit) if selection.names else {})
    facts = {"model": str(folder), "tasks": results, "ranks": world.size, "limit": limit}
    return {**facts, "lm_eval": lm_eval.__version__, **scored, "notes": notes}


def _require_counts(limit: int | None, batch_size: int, num_fewshot: int | None) -> None:
    """Raise ConfigError for numbers that make no evaluation."""
    for name, value, least in (("limit", limit, 1), ("batch_size", batch_size, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{name} = {value} must be {least} or more.")


@contextlib.contextmanager
def _task_folder() -> Iterator[str]:
    """The shipped task files, for as long as they are needed."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in task_files().items():
            Path(folder, name).write_bytes(content)
        yield folder


@contextlib.contextmanager
def _refusing(names: Sequence[str], where: str | Path | None) -> Iterator[None]:
    """Within it whatever tasks of others raise is a ConfigError; nothing is changed for shipped ones (None)."""
    try:
        yield
    except MocteError:
        raise
    except Exception as error:  # tasks are programs of others and fail in every way
        if where is None:
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = one_line(error) if str(error).strip() else f"in {Path(place.filename).name}: {place.line}"
        way_out = "Mend the task file, or leave the task out."
        if where == _HUB:
            way_out = "Without a network, --offline takes a folder that tools/get_benchmarks.py has filled."
        raise ConfigError(
            f"lm-eval could not run {', '.join(names)} with {where}: {type(error).__name__}: {text}. {way_out}"
        ) from error


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """What lm-eval's model warns of within: texts that were cut."""
    found: list[str] = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if "runcat" in text:
                found.append(text)

    logger, heard = logging.getLogger(_WARNED), Heard()
    level, shown = logger.level, logger.propagate
    logger.addHandler(heard)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(heard)
        logger.setLevel(level)
        logger.propagate = shown


def _model(folder: Path, batch_size: int, device: str | None, model_args: dict[str, Any]) -> Any:
    """The model in a folder of either kind."""
    from mocte_ds.evaluation.harness_models import MocteLM, folder_model

    if is_checkpoint(folder) or model_args:
        return MocteLM(folder, batch_size=batch_size, device=device, **model_args)
    return folder_model(folder, batch_size, device)
