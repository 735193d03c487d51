"""What stages train with, made from settings: data, plan and starting weights."""
