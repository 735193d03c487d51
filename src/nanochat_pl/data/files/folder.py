"""The files that a path, folder or glob means, and what of a folder is left out. Links are followed once."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.common.text_files import kind_of_file, require_regular
from nanochat_pl.common.user_path import user_path
from nanochat_pl.data.files.read import SUFFIXES, format_of

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4")
_MAX_NAMED = 8
_MAX_COMPARED = 1000  # names of a folder among which the one that was meant is looked for
_GONE = (FileNotFoundError, ProcessLookupError)  # what was deleted while it was listed, or a process that has ended


@dataclass(frozen=True)
class FoundFiles:
    """The files of a path.

    Attributes:
        files: to read, by name, in sorted order.
        left_out: names of those beside them that are not read, with the reason in words: a suffix, or what it is.
    """

    files: dict[str, Path]
    left_out: dict[str, str]

    def remarks(self) -> list[str]:
        """A line on what is left out; none where all is read."""
        if not self.left_out:
            return []
        reasons = sorted(set(self.left_out.values()))
        more = " …" if len(reasons) > _MAX_NAMED else ""
        number = f"{len(self.left_out):,} file{'s' if len(self.left_out) > 1 else ''}"
        return [f"{number} left out ({', '.join(reasons[:_MAX_NAMED])}{more}), the first {min(self.left_out)}"]


def find_files(key: str, given: str, suffixes: Sequence[str] = SUFFIXES) -> FoundFiles:
    """The files that a path, folder or glob means, by name, in sorted order.

    A folder stands for the files with one of the suffixes in it and below; hidden ones are left out. A folder that is
    reached twice, by a link or a loop of links, is read once, and so is a file.

    Raises:
        UserError: there is none, a folder cannot be listed, or what is named is no regular file.
    """
    path = Path(user_path(key, given))
    if path.is_dir():
        return _in_folder(key, given, path, suffixes)
    if path.exists() or path.is_symlink():
        require_regular(path)
    # Path.glob takes no absolute patterns.
    matches = [path] if path.is_file() else sorted(map(Path, _matching(str(path))))
    kinds = {match: kind_of_file(match) for match in matches}
    paths = _once([match for match, kind in kinds.items() if kind is None])
    if not paths:
        raise UserError(_missing(key, given))
    unknown = [str(file) for file in paths if not format_of(file, suffixes)]
    if unknown:
        raise UserError(f"{key}={given!r}: {unknown[0]} does not end with {' or '.join(suffixes)}.")
    folder = Path(os.path.commonpath([file.parent for file in paths]))
    files = {file.relative_to(folder).as_posix(): file for file in paths}
    odd = {str(match): kind for match, kind in kinds.items() if kind and kind != "a folder"}
    return FoundFiles(files, odd)


def require_there(key: str, given: str) -> None:
    """Raise :class:`UserError` where a path, folder or glob means nothing that is there, an empty file or a folder
    without files; no file is looked into."""
    path = Path(user_path(key, given))
    if path.is_dir():
        if all(file.name.startswith(".") for file in _files_below(path)):
            raise UserError(f"{key}={given!r}: there are no files in this folder.")
    elif path.is_file():
        if path.stat().st_size == 0:
            raise UserError(f"{key}={given!r}: this file is empty.")
    elif not path.exists() and not any(True for _ in _matching(str(path))):
        raise UserError(_missing(key, given))


def _missing(key: str, given: str) -> str:
    hint = _nearest(Path(user_path(key, given)))
    return f"{key}={given!r}: there is no such file or folder (seen from {Path.cwd()}){hint}"


def _nearest(path: Path) -> str:
    """The end of a sentence: names in the same folder that are much like the one that is not there."""
    try:
        names = [entry.name for entry in itertools.islice(path.parent.iterdir(), _MAX_COMPARED)]
    except OSError:
        return "."
    hint = did_you_mean(path.name, names)
    return f"; {hint}" if hint.startswith("did you mean ") else "."


def _in_folder(key: str, given: str, folder: Path, suffixes: Sequence[str]) -> FoundFiles:
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    found = sorted((file.relative_to(folder).as_posix(), file) for file in _files_below(folder))
    kinds = {file: kind_of_file(file) for _, file in found}
    kept = set(_once([file for file, kind in kinds.items() if kind is None]))
    for name, file in found:
        if kind := kinds[file]:
            left_out[name] = kind
        elif not format_of(file, suffixes):
            left_out[name] = _suffix(file)
        elif file.name.startswith("."):
            left_out[name] = "hidden"
        elif file not in kept:
            left_out[name] = "a link to one that is read"
        else:
            files[name] = file
    # Of hidden files those that would be read are of interest, and no settings of some program.
    left_out = {name: why for name, why in left_out.items() if why == "hidden" or not Path(name).name.startswith(".")}
    if not files:
        there = sorted(set(left_out.values()))
        raise UserError(
            f"{key}={given!r}: no file in this folder ends with {' or '.join(suffixes)}; "
            + (f"there are {', '.join(there[:_MAX_NAMED])}." if there else "it is empty.")
        )
    return FoundFiles(files, left_out)


def _files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and below, but for those in hidden folders; each folder once, however it is reached."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, _GONE):
            raise UserError(f"{error.filename}: cannot be listed: {error.strerror}.") from error

    seen = {_identity(folder)}
    for at, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        visible = sorted((os.path.islink(Path(at, name)), name) for name in folders if not name.startswith("."))  # noqa: PTH114
        folders[:] = []
        for _, name in visible:
            identity = _identity(Path(at, name))
            if identity is not None and identity not in seen:
                seen.add(identity)
                folders.append(name)
        yield from (Path(at, name) for name in names)


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a folder from all others, whatever its name; None: it is no more."""
    try:
        status = path.stat()
    except _GONE:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be looked at: {error.strerror}.") from error
    return status.st_dev, status.st_ino


def _once(files: Sequence[Path]) -> list[Path]:
    """Of paths that lead to one file the first that is no link, else the first; in their order."""
    chosen: dict[Path, Path] = {}
    for file in files:
        first = chosen.setdefault(target := file.resolve(), file)
        if first.is_symlink() and not file.is_symlink():
            chosen[target] = file
    kept = set(chosen.values())
    return [file for file in dict.fromkeys(files) if file in kept]


def _matching(pattern: str) -> list[str]:
    """What a glob matches. ``**`` goes through folders as :func:`_files_below` does, so no loop of links takes long."""
    before, stars, after = pattern.partition("**")
    if not stars or (before and not before.endswith("/")):
        return glob.glob(pattern)  # noqa: PTH207
    tops = glob.glob(before) if glob.has_magic(before) else [before or "."]  # noqa: PTH207
    parts = f"**{after}".split("/")
    return [
        str(file)
        for top in map(Path, tops)
        if top.is_dir()
        for file in _files_below(top)
        if _matches(file.relative_to(top).parts, parts)
    ]


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a relative path matches a glob, part by part: ``**`` stands for any number of folders."""
    if not pattern:
        return not parts
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        return bool(parts) if not rest else any(_matches(parts[i:], rest) for i in range(len(parts)))
    if not parts or (parts[0].startswith(".") and not first.startswith(".")):
        return False
    return fnmatch.fnmatchcase(parts[0], first) and _matches(parts[1:], rest)


def _suffix(file: Path) -> str:
    """How a file's name ends; of a compressed one what it holds too."""
    ends = file.suffixes[-2:] if file.suffix.lower() in _COMPRESSED else file.suffixes[-1:]
    return "".join(ends) or file.name
