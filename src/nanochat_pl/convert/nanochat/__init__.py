"""Checkpoints of nanochat, read and written."""
