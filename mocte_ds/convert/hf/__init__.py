"""Checkpoints to Hugging Face format and back: exact, checked before a conversion counts as done."""
