"""The one kind of error that users are meant to see.

Code raises :class:`UserError` for whatever a person can put right: a wrong key, a missing file, a full disk. The
command line prints it without a traceback and exits with code 2. ``assert`` is for invariants of our own.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

# Control characters but for tab and line end, and halves of surrogate pairs.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

MAX_LISTED = 24  # names: more are not read


class UserError(Exception):
    """One or more foreseeable problems, each said in one line, and what to do about them.

    Args:
        problem: what is wrong: names the key or the file, and its value. Several problems: a sequence of lines.
        fix: what the person can do, as a command or a setting where possible.
    """

    def __init__(self, problem: str | Sequence[str], fix: str = "") -> None:
        problems = (problem,) if isinstance(problem, str) else tuple(problem)
        self.problems: tuple[str, ...] = tuple(map(visible, problems))
        self.fix = visible(fix)
        super().__init__("\n".join([*self.problems, *([fix] if fix else [])]))

    @property
    def in_one_line(self) -> str:
        """The problems and what to do, where there is room for one line."""
        return " ".join(filter(None, [*self.problems, self.fix]))


class SharedError(UserError):
    """One that all processes of a training raise alike: the main one prints it."""


class LostContact(RuntimeError):
    """Another process of the training has ended while this one waited for it: what that one has said is the cause.

    Attributes:
        signum: the signal by which this one had been asked to stop before; None where it had not.
    """

    signum: int | None = None


class NotFiniteError(UserError):
    """A model gives NaN or infinities: a choice among such metrics would look like guessing.

    Args:
        where: the file of the weights, what was being measured, or both; empty where the caller knows neither.
    """

    def __init__(self, where: str = "") -> None:
        self.where = where
        super().__init__(
            f"{where}{': ' if where else ''}the model's outputs are not finite numbers (NaN).",
            "Its weights are of no use, or overflow in the type it computes in (evaluate takes dtype=float32): look at"
            " the losses of its training.",
        )


def visible(text: str) -> str:
    """A text as a terminal may have it: what would steer the terminal, or cannot be encoded, becomes its escape."""
    return _UNSEEN.sub(lambda sign: ascii(sign[0])[1:-1], text)


def first_line(error: BaseException) -> str:
    """What an error says in its first line, or else its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def listed(names: Sequence[str], most: int) -> str:
    """Names for a message, the first of them and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def did_you_mean(name: str, valid: Iterable[str], limit: int = 3) -> str:
    """A clause that names the valid names nearest to a wrong one: all of them where they are few."""
    names = sorted(set(valid))
    near = difflib.get_close_matches(name, names, n=limit, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    if len(names) <= MAX_LISTED:
        return f"valid: {', '.join(names)}"
    return f"there are {len(names)} valid names, {names[0]} … {names[-1]}"
