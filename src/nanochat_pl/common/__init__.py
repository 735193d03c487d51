"""What every package may use and what imports nothing of ours: errors, constants, files, settings, hardware."""
