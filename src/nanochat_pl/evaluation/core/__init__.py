"""The CORE benchmark."""
