"""Packing documents into rows, and rows by address."""
