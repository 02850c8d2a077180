"""How much an expert can still learn, and which experts freeze or thaw because of it."""

from mocte_ds.registry import POLICIES
from mocte_ds.trainability.conflict import Conflict, coherence, conflict
from mocte_ds.trainability.ghost import ghost_gram
from mocte_ds.trainability.kernel import lambda_max, products_flops, top_eigenpair
from mocte_ds.trainability.policy import Case, Decision, Policy, Probe, policy, rule_of
from mocte_ds.trainability.rules import progress_share  # and with it the policies that come with the package

__all__ = [
    "POLICIES",
    "Case",
    "Conflict",
    "Decision",
    "Policy",
    "Probe",
    "coherence",
    "conflict",
    "ghost_gram",
    "lambda_max",
    "policy",
    "products_flops",
    "progress_share",
    "rule_of",
    "top_eigenpair",
]
