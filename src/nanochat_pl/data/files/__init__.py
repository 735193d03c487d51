"""Reading local files: formats, encodings, splits."""
