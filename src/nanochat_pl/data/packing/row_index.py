"""The row index: which pieces of which documents make which row. Kept on disk, read by memory map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build, to_plain
from nanochat_pl.data.cache.content_cache import read_cache, write_cache


@dataclass(frozen=True)
class PackingStats:
    """What became of the documents, in tokens without bos.

    Attributes:
        placed_tokens: in a row; twice those of a stream that are the last target of one row and the first input of the
            next.
        cropped_tokens: dropped, because their document was cut to fill a row.
        padded_places: places of rows that hold nothing.
        pieces: pieces in rows that have a bos: all of them but in a stream, where a row may go on with a document.
        epochs: passes over the documents that were begun.
    """

    placed_tokens: int
    cropped_tokens: int
    padded_places: int
    pieces: int
    epochs: int

    def __add__(self, other: PackingStats) -> PackingStats:
        return PackingStats(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    @property
    def trained_share(self) -> float:
        """Share of the tokens taken from the packer's buffer that is in a row."""
        return self.placed_tokens / max(self.placed_tokens + self.cropped_tokens, 1)


@dataclass(frozen=True)
class RowIndex:
    """Which pieces make which row.

    Attributes:
        row_capacity: places of a row, T+1.
        row_starts: int64 (num_rows + 1,): row n has the pieces row_starts[n] … row_starts[n + 1] - 1, left to right.
        pieces: int32 (num_pieces, 3): document, first token, number of tokens; bos comes on top, in front of each. Of a
            stream (num_pieces, 4): the last column says whether it does.
        epoch_starts: int64: the first row of each epoch, where rows keep to one epoch; else only 0.
        kept: folder and key, where it was read from the disk.
    """

    row_capacity: int
    row_starts: np.ndarray
    pieces: np.ndarray
    epoch_starts: np.ndarray
    stats: PackingStats
    kept: tuple[Path, Any] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    def pieces_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of some rows.

        Args:
            rows: int64 (R,).

        Returns:
            how many each row has, int64 (R,), and all of them, row by row, int64 (N, 4): document, first token, number
            of tokens, and 1 where bos comes on top.
        """
        first, last = self.row_starts[rows], self.row_starts[rows + 1]
        numbers = np.concatenate([np.arange(0), *map(np.arange, first, last)])
        pieces = self.pieces[numbers].astype(np.int64)
        if pieces.shape[1] == 3:
            pieces = np.column_stack([pieces, np.ones(len(pieces), dtype=np.int64)])
        return last - first, pieces

    def wait_for(self, num_rows: int, check: Callable[[], None] = lambda: None) -> None:
        """All rows are there."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """Sent to another process, what is on the disk is opened there again and not copied."""
        return super().__reduce_ex__(protocol) if self.kept is None else (_opened_again, self.kept)


_ARRAYS = ("row_starts", "pieces", "epoch_starts")


def kept_index(folder: Path, key: Any, make: Callable[[], RowIndex]) -> RowIndex:
    """The index kept in a folder; made, written and read back where there is none with this key."""
    index = read_index(folder, key)
    if index is None:
        _write(folder, key, make())
        index = read_index(folder, key)
        assert index is not None, f"{folder}: was written and cannot be read back"
    return index


def read_index(folder: Path, key: Any) -> RowIndex | None:
    """The index kept in a folder, if there is one with this key."""
    facts = read_cache(folder, key)
    if facts is None:
        return None
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
    stats = build(PackingStats, facts["stats"], str(folder))
    return RowIndex(facts["row_capacity"], stats=stats, kept=(folder, key), **arrays)


def _opened_again(folder: Path, key: Any) -> RowIndex:
    index = read_index(folder, key)
    if index is None:
        raise UserError(f"{folder}: the row index was whole and is not any more.", fix="The same command goes on.")
    return index


def _write(folder: Path, key: Any, index: RowIndex) -> None:
    def writer(array: np.ndarray) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            # Not np.save: where the disk is full it writes less, and does not say why.
            header = np.lib.format.header_data_from_array_1_0(array)
            with path.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(array).data)

        return write

    files = {f"{name}.npy": writer(getattr(index, name)) for name in _ARRAYS}
    write_cache(folder, key, files, {"row_capacity": index.row_capacity, "stats": to_plain(index.stats)})
