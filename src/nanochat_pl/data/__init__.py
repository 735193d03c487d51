"""Text and conversations into rows: sources, token cache, packing, rows with addresses."""
