"""Checks of the device, its collectives and a tiny training against stored values."""
