"""Composing, checking and instantiating configurations: the only package with Hydra."""
