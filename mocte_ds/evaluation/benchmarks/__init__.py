"""Standard tasks without a network: a folder with their data, and lm-eval's own task definitions served from it."""

from mocte_ds.evaluation.benchmarks.catalogue import CORE
from mocte_ds.evaluation.benchmarks.serve import Benchmarks

__all__ = ["CORE", "Benchmarks"]
