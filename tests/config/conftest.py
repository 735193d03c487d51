"""The fixtures of the command line's tests: these compose what commands take."""

from tests.cli.conftest import here

__all__ = ["here"]
