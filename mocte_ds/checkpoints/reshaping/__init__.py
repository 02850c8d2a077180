"""Checkpoints in another layout: other numbers of ranks, other spreads of the experts."""
