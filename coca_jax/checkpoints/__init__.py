"""Checkpoints of a run: what is saved, how it is read, and what proves it whole."""
