"""The commands. One file per verb; the only room that knows Hydra."""
