"""The optimizer and its schedules. Knows roles of parameters, no model. Its settings are read without torch."""
