"""Checkpoints to megatron-core's distributed format and back: exact, checked before a conversion counts as done."""
