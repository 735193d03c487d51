"""Metrics of a model: bits per byte, tasks, and their standard errors."""
