"""Paths as people type them behind a key: one set of checks for all."""

from __future__ import annotations

import os

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.text_files import is_unicode

_MAX_SHOWN = 200


def user_path(key: str, text: str) -> str:
    """The path, or glob, that a person means: ``~`` is expanded, which the shell leaves alone behind ``key=``.

    Text, since a :class:`~pathlib.Path` would tidy it up. Nothing need be there.

    Raises:
        UserError: it is empty, cannot be written to a text file, begins with the home folder of nobody, or the system
            refuses to look at it: a name too long, a loop of links, no right to it.
    """
    shown = f"{key}={text[:_MAX_SHOWN]!r}{'…' if len(text) > _MAX_SHOWN else ''}"
    if not text:
        raise UserError(f"{shown}: is empty.", "Give a path, or leave the key out.")
    if "\0" in text or not is_unicode(text):
        raise UserError(
            f"{shown}: is no path: it has bytes that are not UTF-8, or a NUL.",
            "Rename that file or folder, or make a link of another name to it.",
        )
    expanded = os.path.expanduser(text)  # noqa: PTH111 (see above)
    if expanded.startswith("~"):
        home = expanded.partition("/")[0]
        raise UserError(
            f"{shown}: there is no home folder {home}.", "A file or folder whose name begins with ~ is given as ./~…."
        )
    try:
        os.stat(expanded)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UserError(
            f"{shown}: cannot be looked at: {error.strerror or error}.", "Give a path that you may use."
        ) from error
    return expanded
