"""Tasks whose problems are generated, one file each."""
