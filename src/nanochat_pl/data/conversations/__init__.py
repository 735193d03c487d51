"""Files of conversations: formats, validation and tables."""
