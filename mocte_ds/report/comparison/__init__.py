"""Several runs beside each other: losses on three clocks and by domain, events, costs, settings that differ."""

from mocte_ds.report.comparison.write import write_comparison

__all__ = ["write_comparison"]
