"""Data sets of a hub: manifests and downloads."""
