"""Content-addressed caches of tokens and conversations."""
