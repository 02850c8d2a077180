"""Checkpoints: saving and loading in a run, a checkpoint as one model, and export to Hugging Face format."""
