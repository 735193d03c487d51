"""Resume files: writing, reading, and what must match to go on."""
