"""How much an expert still has to learn, and who freezes or thaws because of it."""

from mocte_ds.trainability.conflict import Conflict, coherence, conflict
from mocte_ds.trainability.ghost import ghost_gram
from mocte_ds.trainability.kernel import lambda_max, top_eigenpair
from mocte_ds.trainability.policy import Decision, Policy, Probe, make_policy

__all__ = [
    "Conflict",
    "Decision",
    "Policy",
    "Probe",
    "coherence",
    "conflict",
    "ghost_gram",
    "lambda_max",
    "make_policy",
    "top_eigenpair",
]
