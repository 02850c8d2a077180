"""A run's report: one web page with figures and tables, made from the run's logs and from nothing else."""

from mocte_ds.report.reader import read_run
from mocte_ds.report.run import Run
from mocte_ds.report.write import write_report

__all__ = ["Run", "read_run", "write_report"]
