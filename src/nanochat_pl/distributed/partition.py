"""Which rows of a step, or of a validation, are whose."""

from __future__ import annotations


def share(first: int, count: int, rank: int, world: int) -> range:
    """The rows of process ``rank`` of ``world``, of the ``count`` rows from ``first``.

    Each row is in one share; the shares follow each other; the first ones have a row more where ``count`` cannot be
    divided, and the last ones none at all where it is less than ``world``.
    """
    each, more = divmod(count, world)
    begin = first + rank * each + min(rank, more)
    return range(begin, begin + each + (rank < more))
