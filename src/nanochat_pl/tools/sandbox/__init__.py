"""Runs code that a model has written behind isolation: see docs/sandbox.md.

Empty of imports: the isolated processes (launcher.py) import this package with the standard library alone.
"""
