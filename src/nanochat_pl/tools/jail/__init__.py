"""The processes of a sandbox. They import the standard library alone, and are started by ``launcher.py``."""
