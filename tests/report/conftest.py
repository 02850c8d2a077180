"""Invented runs that the tests of the report share; nobody changes them."""

from pathlib import Path
from typing import Any

import pytest

from mocte_ds.report import write_report
from mocte_ds.report.reader import read_run
from mocte_ds.report.run import Run
from tests.report.synthetic import write_dense_run, write_run


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and logs of a finished run with emergences, freezes and a thaw."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, write_run(folder, steps=120, budget=120, experts=3)


@pytest.fixture(scope="session")
def logs(whole: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """What was written for the finished run."""
    return whole[1]


@pytest.fixture(scope="session")
def run(whole: tuple[Path, dict[str, Any]]) -> Run:
    """The finished run as the report reads it."""
    return read_run(whole[0])


@pytest.fixture(scope="session")
def report(whole: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder of the finished run's report, and what write_report returned."""
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    return out, write_report(whole[0], out, progress=False)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A dense run as the report reads it."""
    folder = tmp_path_factory.mktemp("dense")
    write_dense_run(folder, steps=40, budget=40)
    return read_run(folder)


@pytest.fixture(scope="session")
def early(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that is still in its warm-up, before its first validation and without an evaluation."""
    folder = tmp_path_factory.mktemp("early")
    write_run(folder, steps=6, budget=120, emergences=False)
    (folder / "evaluation" / "results.json").unlink()
    (folder / "ledger.json").unlink()
    return read_run(folder)
