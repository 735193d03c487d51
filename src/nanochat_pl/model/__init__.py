"""The language model: its config, its forward, its loss, its cache, its first weights, and what it costs."""
