"""Evaluation of an exported model or a run's checkpoint with lm-evaluation-harness, without a network."""

from mocte_ds.evaluation.lm import evaluate, offline_tasks

__all__ = ["evaluate", "offline_tasks"]
