"""Rows with addresses: row n is a pure function of documents, tokenizer, packing settings, seed and n."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.data.cache_folder import fingerprint_of
from nanochat_pl.data.packing import PACKER_VERSION, Mode, pack
from nanochat_pl.data.row_index import RowIndex, kept_index
from nanochat_pl.data.sources import DataSettings
from nanochat_pl.data.token_cache import ConversationCache, TokenCache


@dataclass(frozen=True)
class PieceAddress:
    """Where a piece of a row comes from: tokens start … stop - 1 of a document, counted without bos.

    Attributes:
        shard: name of the source's shard.
        document: the document's number in that shard, from 0, empty ones counted too.
    """

    shard: str
    document: int
    start: int
    stop: int


class Rows:
    """Rows of T inputs and T targets, read from a token cache by a row index.

    Args:
        cache: the tokens.
        index: which pieces make which row; its capacity is T+1.
        sequence_len: T.
        bos_id: stands in front of every piece, and fills padding.
    """

    def __init__(self, cache: TokenCache, index: RowIndex, sequence_len: int, bos_id: int) -> None:
        assert index.row_capacity == sequence_len + 1, f"rows of {index.row_capacity} places for T={sequence_len}"
        self.cache = cache
        self.index = index
        self.sequence_len = sequence_len
        self.bos_id = bos_id

    def __len__(self) -> int:
        return self.index.num_rows

    def read(self, row_numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows by number.

        Returns:
            inputs and targets, each int64 (R, T) for R row numbers. Target t is the token t+1, IGNORE_INDEX where that
            is padding or, for conversations, not trained on.

        Raises:
            IndexError: a row number is negative or past the end.
        """
        num_rows, capacity = len(row_numbers), self.sequence_len + 1
        ids = np.full((num_rows, capacity), self.bos_id, dtype=np.int64)
        trained = np.zeros((num_rows, capacity), dtype=np.bool_)
        for ids_row, trained_row, number in zip(ids, trained, row_numbers, strict=True):
            self._read_row(int(number), ids_row, trained_row)
        return ids[:, :-1].copy(), np.where(trained[:, 1:], ids[:, 1:], IGNORE_INDEX)

    def address(self, row_number: int) -> list[PieceAddress]:
        """What a row is made of, from left to right."""
        addresses = []
        for document, start, length in self._pieces(row_number):
            shard, number = self.cache.locate(document)
            addresses.append(PieceAddress(shard.name, number, start, start + length))
        return addresses

    def _pieces(self, row_number: int) -> list[list[int]]:
        if not 0 <= row_number < len(self):
            raise IndexError(f"row {row_number} of {len(self)}")
        starts = self.index.row_starts
        return self.index.pieces[starts[row_number] : starts[row_number + 1]].tolist()

    def _read_row(self, row_number: int, ids: np.ndarray, trained: np.ndarray) -> None:
        at = 0
        for document, start, length in self._pieces(row_number):
            shard, number = self.cache.locate(document)
            first = int(shard.offsets[number]) + start
            stop = at + 1 + length
            ids[at + 1 : stop] = shard.tokens[first : first + length]
            if shard.mask is None:
                trained[at:stop] = True  # a piece's bos too: that a document ends is learnt
            else:
                trained[at + 1 : stop] = shard.mask[first : first + length]
            at = stop


def packed_rows(
    cache: TokenCache,
    sequence_len: int,
    bos_id: int,
    mode: Mode,
    cache_dir: Path,
    *,
    num_rows: int | None = None,
    epochs: int | None = None,
    buffer_documents: int = 1_000,
    refill_documents: int = 128,
    shuffle: bool = True,
    seed: int = 0,
) -> Rows:
    """Rows of a token cache, packed or found packed. For the arguments see :func:`nanochat_pl.data.packing.pack`."""
    settings = {
        "row_capacity": sequence_len + 1,
        "mode": mode,
        "num_rows": num_rows,
        "epochs": epochs,
        "buffer_documents": buffer_documents,
        "refill_documents": refill_documents,
        "shuffle": shuffle,
        "seed": seed,
    }
    key = {"packer": PACKER_VERSION, "tokens": cache.fingerprint, **settings}
    folder = cache_dir / "rows" / fingerprint_of(key)[:32]
    index = kept_index(folder, key, lambda: pack(cache.lengths, **settings))  # type: ignore[arg-type]
    return Rows(cache, index, sequence_len, bos_id)


def training_rows(
    cache: TokenCache, settings: DataSettings, sequence_len: int, bos_id: int, cache_dir: Path, num_rows: int
) -> Rows:
    """The first ``num_rows`` rows to pretrain on, as the config group ``data`` wants them: full, epoch after epoch."""
    return packed_rows(
        cache,
        sequence_len,
        bos_id,
        settings.long_documents,
        cache_dir,
        num_rows=num_rows,
        buffer_documents=settings.pack_buffer_documents,
        refill_documents=settings.pack_refill_documents,
        shuffle=settings.shuffle,
        seed=settings.seed,
    )


def conversation_rows(
    cache: ConversationCache,
    sequence_len: int,
    bos_id: int,
    cache_dir: Path,
    *,
    num_rows: int | None = None,
    epochs: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
) -> Rows:
    """Rows of whole conversations, padded: for so many rows, or for whole epochs (then ``len`` is their length)."""
    return packed_rows(
        cache,
        sequence_len,
        bos_id,
        "pad",
        cache_dir,
        num_rows=num_rows,
        epochs=epochs,
        buffer_documents=100,
        refill_documents=1,
        shuffle=shuffle,
        seed=seed,
    )


def validation_rows(cache: TokenCache, sequence_len: int, bos_id: int, cache_dir: Path, num_rows: int) -> Rows:
    """The rows to validate on: at most ``num_rows``, fewer where the documents end before.

    They depend on the held-out text, the tokenizer and T alone, on no setting of training, so figures of runs that
    pack, shuffle or split otherwise can be compared. No token of a document is dropped; the last row may be padded.
    """
    return packed_rows(cache, sequence_len, bos_id, "split", cache_dir, num_rows=num_rows, epochs=1)
