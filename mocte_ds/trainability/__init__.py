"""How much an expert still has to learn, and who freezes or thaws because of it."""

from mocte_ds.trainability.kernel import lambda_max, top_eigenpair
from mocte_ds.trainability.policy import Decision, Policy, Probe, make_policy

__all__ = ["Decision", "Policy", "Probe", "lambda_max", "make_policy", "top_eigenpair"]
