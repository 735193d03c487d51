"""Inspection of the data of a stage before it is trained on."""
