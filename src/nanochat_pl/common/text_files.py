"""Files that people give: that they are files at all, and what is said of text that is not UTF-8."""

from __future__ import annotations

import codecs
import shlex
import stat
from pathlib import Path

from nanochat_pl.common.errors import UserError

_BLOCK = 2**16
# UTF-32 before UTF-16: the mark of one begins with that of the other.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
MAX_NUL_SHARE = 0.05  # of the bytes, from where on a text without a mark is taken for UTF-16 or UTF-32
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO (a named pipe)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def kind_of_file(path: Path) -> str | None:
    """What a path leads to where that is no regular file, in words; None for one, and for a path that is not there."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a link to something that is not there" if path.is_symlink() else None
    except OSError as error:
        return f"unreadable ({error.strerror})"
    if stat.S_ISREG(mode):
        return None
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "no regular file")


def require_regular(path: Path) -> None:
    """Refuse what is no regular file: to read from a FIFO or a terminal may wait for ever.

    Raises:
        UserError: it is something else; the message names what. A path that is not there is none of its business.
    """
    if (kind := kind_of_file(path)) is not None:
        raise UserError(f"{path}: is {kind}, not a regular file.", "Write what it holds to a file, and give that.")


def read_bytes(path: Path, max_bytes: int | None = None) -> bytes:
    """The contents of a file.

    Args:
        path: a regular file.
        max_bytes: that it may have; None: any number.

    Raises:
        UserError: it is missing, no regular file, or too large.
    """
    require_regular(path)
    try:
        size = path.stat().st_size
        if max_bytes is not None and size > max_bytes:
            raise UserError(f"{path}: {size:,} bytes, more than the {max_bytes:,} that such a file may have.")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_text(path: Path, max_bytes: int) -> str:
    """The text of a small file, without a byte order mark.

    Args:
        path: a regular file.
        max_bytes: that it may have.

    Raises:
        UserError: it is missing, no regular file, too large, or not UTF-8.
    """
    data = read_bytes(path, max_bytes)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.start, error.reason) from error


def is_unicode(text: str) -> bool:
    """Whether a text has a UTF-8 form: JSON, pickles and escapes can hold half a surrogate pair, which has none."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def wide_encoding(start: bytes) -> str | None:
    """UTF-16 or UTF-32 where the first bytes of a text are of it: by their mark, or by the NULs between letters."""
    for mark, name in _MARKS:
        if start.startswith(mark):
            return name
    if start.count(0) <= MAX_NUL_SHARE * len(start):
        return None
    if start[:4].count(0) == 3:
        return "UTF-32BE" if start[0] == 0 else "UTF-32LE"
    # Letters of most scripts' text are in one page, blanks and line ends in page 0.
    return "UTF-16BE" if start[0::2].count(0) > start[1::2].count(0) else "UTF-16LE"


def not_utf8(path: Path, position: int, reason: str) -> UserError:
    """The error for a file that is not UTF-8: which encoding it is in where its bytes tell, else that nobody but the
    person can know.

    Args:
        path: the file.
        position: of the first byte at fault, from 0.
        reason: what the decoder said.
    """
    with path.open("rb") as file:
        wide = wide_encoding(file.read(_BLOCK))
    name, copy = shlex.quote(str(path)), shlex.quote(f"{path}.utf8")
    if wide is not None:
        how = "byte order mark" if len(wide) == 6 else "NULs between its letters"
        return UserError(
            f"{path}: is not UTF-8: it is {wide}, by its {how}.",
            f"Convert it: iconv -f {wide} -t UTF-8 {name} > {copy} && mv {copy} {name}",
        )
    return UserError(
        f"{path}: is not UTF-8: byte {position:,} ({reason})",
        f"Convert it: iconv -f ENCODING -t UTF-8 {name} > {copy} && mv {copy} {name}. Which ENCODING it was written in"
        " its author knows (GB18030, SHIFT_JIS, EUC-KR, WINDOWS-1251, WINDOWS-1252 …); a wrong one gives other letters"
        " without an error, so look at the result.",
    )
