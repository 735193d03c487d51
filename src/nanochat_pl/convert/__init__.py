"""Checkpoints in the layouts of other projects, read and written, each with a certificate of what is equal."""
