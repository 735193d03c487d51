"""Files that are whole or not there: atomic writing, checked reading."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.text_files import read_bytes, require_regular

MAX_JSON_BYTES = 64 * 2**20
_PLACES = "paths.runs=… (runs), paths.cache=… (caches), to=… (import and export)"
_LEFTOVER = re.compile(r"(.+\.tmp|\.write-probe)\.[0-9a-f]{16}")
FREE_SPACE = f"Free some space, or write to another disk: {_PLACES}."


@contextlib.contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about a path (full, read-only, not a folder) into a :class:`UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {_explain(error, path)}", fix=_fix(error)) from error


def _explain(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({free_bytes(path) / 2**20:,.0f} MiB free)"
    return error.strerror or str(error)


def _fix(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FREE_SPACE
    return f"Give a folder that can be written: {_PLACES}."


def entries(folder: Path) -> list[Path]:
    """What is in a folder: nothing where it is not there.

    Raises:
        UserError: it cannot be read; :meth:`Path.glob` would say that it is empty.
    """
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror or error}") from error


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that holds ``path``, or would hold it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def ensure_folder(path: Path) -> Path:
    """Make a folder and prove that a file can be written into it.

    Raises:
        UserError: it cannot be made or written; the message names it and the reason.
    """
    with explain_disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-probe.{secrets.token_hex(8)}"
        probe.write_bytes(b"x")
        probe.unlink(missing_ok=True)
    return path


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed left in a folder and those below. The caller knows that nobody writes."""
    for path in [path for path in folder.rglob("*") if is_leftover(path)]:
        path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether a file is one that a writer had not finished, or is just writing."""
    return _LEFTOVER.fullmatch(path.name) is not None


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable (POSIX; elsewhere nothing is to be done)."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(
    path: Path, write: Callable[[Path], None], check: Callable[[Path], None] = lambda temporary: None
) -> None:
    """Write a file so that a reader sees the old one or the new one whole, whatever kills the writer.

    ``write`` fills a temporary file in the same folder, which is synced, checked and renamed over ``path``. What
    ``check`` raises leaves the old one.
    """
    # Not the process's number: threads share it, and so do processes of two containers or machines.
    temporary = path.with_name(f"{path.name}.tmp.{secrets.token_hex(8)}")
    try:
        with explain_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            check(temporary)
            temporary.replace(path)
            fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, surrogates: bool = False) -> None:
    """Write UTF-8 text atomically.

    Args:
        path: the file.
        text: what is in it.
        surrogates: it is JSON, in which halves of surrogate pairs, which have no UTF-8, may be: each as its escape.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace" if surrogates else "strict"))


def write_json(path: Path, value: Any, surrogates: bool = False) -> None:
    """Write JSON atomically. NaN and infinities are refused: they are not JSON; ``surrogates`` is as in write_text."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", surrogates)


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes atomically."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomically(path, write)


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES, infinities: bool = False, surrogates: bool = False) -> Any:
    """Read a JSON file of bounded size.

    Args:
        path: the file.
        max_bytes: the bound.
        infinities: read NaN and infinities, which other programs write, instead of refusing them.
        surrogates: read halves of surrogate pairs, which a model may write, instead of refusing them.

    Raises:
        UserError: it is missing, too large, or no JSON.
    """
    data = read_bytes(path, max_bytes)
    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=None if infinities else _refuse_constant)
        if not surrogates and "\\ud" in text.lower():  # half a surrogate pair is JSON, but no file could hold it
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no valid JSON: {error}") from error


def read_object(path: Path, fix: str = "", surrogates: bool = False) -> dict[str, Any]:
    """Read the JSON object of a file, as :func:`read_json` does.

    Args:
        path: the file.
        fix: what can be done where it is damaged.
        surrogates: read halves of surrogate pairs.

    Raises:
        UserError: it is missing, too large, no JSON, or another value than an object.
    """
    try:
        value = read_json(path, surrogates=surrogates)
    except UserError as error:
        raise UserError(error.problems, fix or error.fix) from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(value).__name__}.", fix)
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal text.

    Raises:
        UserError: it is missing, no regular file, or cannot be read.
    """
    require_regular(path)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def keep_lines_until(path: Path, step: int) -> None:
    """Of a file of JSON lines, each with its ``step``, drop those after ``step``, and one that was cut off.

    Damaged ones are dropped with a word.
    """
    if path.exists():
        lines = whole_lines(path)
        steps = [_step_of(line) for line in lines]
        say_damaged_lines(path, steps.count(None))
        kept = [line for line, of in zip(lines, steps, strict=True) if of is not None and of <= step]
        write_bytes(path, b"".join(line + b"\n" for line in kept))


def _step_of(line: bytes) -> int | None:
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    step = value.get("step") if isinstance(value, dict) else None
    return step if isinstance(step, int) else None


def append_line(path: Path, line: bytes) -> None:
    """Add a line in one write; one that somebody was killed in is ended before it. What a full disk cuts is taken back.

    Args:
        path: of the file, which is made where it is not there.
        line: without its end.

    Raises:
        UserError: the file cannot be written.
    """
    with explain_disk_errors(path), path.open("ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            line = b"\n" + line
        left = memoryview(line + b"\n")
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that grows, without their ends; one that was cut off is left out.

    Raises:
        UserError: it is no regular file, or cannot be read.
    """
    # Not splitlines(): a text may hold other ends of lines than \n. The last piece is empty, or was cut off.
    return read_bytes(path).split(b"\n")[:-1]


def say_damaged_lines(path: Path, number: int) -> None:
    """Say that lines of a file that is rewound were dropped, where any were."""
    if number:
        lines = "1 line is" if number == 1 else f"{number:,} lines are"
        rank_zero_print(f"{path}: {lines} damaged and left out.")
