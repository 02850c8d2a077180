"""Comparisons: the same run with other settings and seeds, equal trials of the learning rate, tables and a page."""

from mocte_ds.study.launch import StudyRunner
from mocte_ds.study.plan import MOST_RANKS, Arm, PlannedRun, Study, read_study
from mocte_ds.study.results import RunResult, read_result
from mocte_ds.study.tables import all_tables

__all__ = [
    "MOST_RANKS",
    "Arm",
    "PlannedRun",
    "RunResult",
    "Study",
    "StudyRunner",
    "all_tables",
    "read_result",
    "read_study",
]
