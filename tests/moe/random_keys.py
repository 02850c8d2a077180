"""Routing keys with numbers at random, as if of some emergence."""

import torch

from mocte_ds.moe.keys import Key


def randomise_key(key: Key) -> None:
    """Other numbers for all that a key stores; every expert gets tokens.

    Args:
        key: any of this package.
    """
    experts = key.num_experts
    for name, buffer in key.named_buffers():
        if name == "cluster_factors":
            buffer.copy_(torch.randint(1, 1 << 20, (2,)))
        elif name == "cluster_pairs":
            # Pairs without a row take the token's own expert, where a key has both.
            buffer.copy_(torch.randint(-1 if hasattr(key, "cluster_table") else 0, experts, buffer.shape))
        elif not buffer.is_floating_point():
            buffer.copy_(torch.randint(experts, buffer.shape))
        elif name != "cluster_bias" or hasattr(key, "cluster_centroids"):
            buffer.copy_(torch.randn(buffer.shape))
