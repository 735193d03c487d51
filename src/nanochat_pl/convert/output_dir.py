"""The folder that an import or an export makes: free before, and gone with all that was made for it after a failure."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import explain_disk_errors
from nanochat_pl.common.run_dir import require_outside


def require_free(to: Path) -> None:
    """Refuse a folder to write to that has something in it, or that cannot be made.

    Raises:
        UserError: it has, it is a file or a link, it has no name, or an import into it was killed half-way.
    """
    if to.name in ("", ".."):
        raise UserError(f"to={to}: must name the folder to make.", fix="For example to=my-model")
    if to.is_symlink():
        raise UserError(f"to={to}: is a link.", fix="Give the folder that it leads to, or another one.")
    try:
        standing = next(parent for parent in to.absolute().parents if parent.exists())
        taken = to.exists() and not (to.is_dir() and not any(to.iterdir()))
        unfinished = _beside(to)
        left = unfinished.exists() or unfinished.is_symlink()
    except OSError as error:
        raise UserError(f"to={to}: cannot be looked into: {error.strerror}", fix="Give another folder.") from error
    if not standing.is_dir():
        raise UserError(f"to={to}: {standing} is a file, no folder.", fix="Give another folder.")
    if taken:
        raise UserError(f"to={to}: is there already.", fix="Give another folder, or delete this one first.")
    require_outside(to)
    if left:
        raise UserError(f"{unfinished}: is there already, and would be written to.", fix="Delete it first.")


@contextlib.contextmanager
def parents_removed_on_error(to: Path) -> Iterator[None]:
    """What goes wrong within takes the folders above ``to`` away again that were not there before."""
    missing = [parent for parent in to.parents if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in missing:  # the innermost first; what somebody else has put into one stays
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


@contextlib.contextmanager
def appears_whole(to: Path) -> Iterator[Path]:
    """Gives a folder beside ``to``, which is not there yet; after an error it goes, else it becomes ``to``.

    Raises:
        UserError: the disk refuses.
    """
    growing = _beside(to)
    with parents_removed_on_error(to):
        try:
            yield growing
            with explain_disk_errors(to):
                if to.exists():
                    to.rmdir()  # empty, as was checked
                growing.replace(to)
        finally:
            shutil.rmtree(growing, ignore_errors=True)


def _beside(to: Path) -> Path:
    return to.with_name(to.name + ".tmp")
