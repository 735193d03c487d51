"""Processes that train together: how they find each other, what they exchange, and how a lost one is noticed."""
