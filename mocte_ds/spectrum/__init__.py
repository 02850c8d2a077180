"""The spectrum of the features: a sample over all ranks and its leading singular directions."""

from mocte_ds.spectrum.sample import Reservoir, hash_keys
from mocte_ds.spectrum.subspace import (
    Subspace,
    certified_rank,
    gap_rank,
    gate_rank,
    sampled_svd,
    split_half_angles,
    split_half_certificate,
)

__all__ = [
    "Reservoir",
    "Subspace",
    "certified_rank",
    "gap_rank",
    "gate_rank",
    "hash_keys",
    "sampled_svd",
    "split_half_angles",
    "split_half_certificate",
]
