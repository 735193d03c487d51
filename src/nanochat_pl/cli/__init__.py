"""The commands. One file per command; the only room that knows Hydra."""
