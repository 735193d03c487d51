"""Code that travels: files that an exported folder carries along. They know nothing of this package."""
