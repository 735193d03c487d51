"""Text and conversations as token ids on disk: tokenised once, read by memory map.

One folder per shard: ``tokens.bin`` (uint16 where the vocabulary allows, else uint32), ``lengths.bin`` (int32, one per
document, 0 for an empty one, so that a document keeps its number), for conversations ``mask.bin`` (uint8 per token),
and a manifest. The folder's name is made of the fingerprints of the shard and of the tokenizer, so a cache cannot be
stale, and a build that was stopped goes on with the first shard that is not there. Tokens are kept without bos: rows
put it in front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.cache_folder import fingerprint_of, read_cache, write_cache
from nanochat_pl.data.sources import Shard, Source, Split
from nanochat_pl.tokenizer import Tokenizer

FORMAT = 1
BATCH_DOCUMENTS = 512
_BATCH_CHARS = 4_000_000
_LENGTH = np.dtype("<i4")

Progress = Callable[[int, int, int], None]  # shards done, shards in all, tokens so far


@dataclass(frozen=True)
class CachedShard:
    """One shard in the cache.

    Attributes:
        name: of the source's shard.
        folder: where it is kept.
        tokens: uint16 or uint32 (num_tokens,), all documents one after the other, by memory map.
        offsets: int64 (num_documents + 1,): document i has the tokens offsets[i] … offsets[i + 1] - 1.
        mask: uint8 (num_tokens,), 1 where a token is trained on; None: all are.
    """

    name: str
    folder: Path
    tokens: np.ndarray
    offsets: np.ndarray
    mask: np.ndarray | None

    @classmethod
    def open(cls, name: str, folder: Path, token_dtype: str, masked: bool) -> CachedShard:
        """Map the files of a folder that has been verified."""
        lengths = np.fromfile(folder / "lengths.bin", dtype=_LENGTH)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        tokens = _map(folder / "tokens.bin", token_dtype)
        mask = _map(folder / "mask.bin", "u1") if masked else None
        assert len(tokens) == offsets[-1] and (mask is None or len(mask) == len(tokens)), folder
        return cls(name, folder, tokens, offsets, mask)

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to a worker process, it is opened there again: the tokens stay in the file."""
        return CachedShard.open, (self.name, self.folder, self.tokens.dtype.str, self.mask is not None)


class TokenCache:
    """All documents of a split as tokens.

    Attributes:
        shards: in the source's order.
        lengths: int32 (num_documents,): tokens per document, without bos.
        masked: whether the shards have masks.
        fingerprint: changes with any token of any document.
    """

    def __init__(self, shards: Sequence[CachedShard], fingerprint: str) -> None:
        self.shards = list(shards)
        self.fingerprint = fingerprint
        self.lengths = np.concatenate([np.diff(shard.offsets) for shard in self.shards]).astype(np.int32)
        self.masked = any(shard.mask is not None for shard in self.shards)
        self._offsets = np.concatenate([shard.offsets[:-1] for shard in self.shards])
        self._first_documents = np.cumsum([0, *(len(shard.offsets) - 1 for shard in self.shards)])

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, without bos."""
        return int(self.lengths.sum(dtype=np.int64))

    def locate(self, document: int) -> tuple[CachedShard, int]:
        """The shard that holds a document, and the document's number in it."""
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        shard = int(np.searchsorted(self._first_documents, document, side="right")) - 1
        return self.shards[shard], document - int(self._first_documents[shard])

    def positions(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each document the number of its shard, and where in that shard's tokens it begins."""
        shards = np.searchsorted(self._first_documents, documents, side="right") - 1
        return shards, self._offsets[documents]

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens start … stop - 1 of a document, without bos (a view of the file)."""
        shard, number = self.locate(document)
        first = int(shard.offsets[number])
        return shard.tokens[first + start : int(shard.offsets[number + 1]) if stop is None else first + stop]


def build_token_cache(
    source: Source, split: Split, tokenizer: Tokenizer, cache_dir: Path, progress: Progress | None = None
) -> TokenCache:
    """Tokenise a split, or find it tokenised.

    Args:
        source, split: which documents.
        tokenizer: encodes them, all cores at work.
        cache_dir: the cache of all runs (``paths.cache``).
        progress: called with the shards done, the shards in all, and the tokens so far.

    Raises:
        UserError: the split has no text, or what the source says of a file. Shards that are done stay done.
    """
    shards = source.shards(split)
    dtype = token_dtype(tokenizer.vocab_size)
    cached: list[CachedShard] = []
    keys = []
    num_tokens = 0
    for number, shard in enumerate(shards):

        def report(tokens_in_shard: int, done: int = number, before: int = num_tokens) -> None:
            if progress is not None:
                progress(done, len(shards), before + tokens_in_shard)

        key = {"format": FORMAT, "tokenizer": tokenizer.fingerprint, "shard": shard.fingerprint}
        folder = cache_dir / "tokens" / fingerprint_of(key)[:32]
        if read_cache(folder, key) is None:
            write_shard(folder, key, _encoded(shard, tokenizer), dtype, {}, report)
        cached.append(CachedShard.open(shard.name, folder, dtype, masked=False))
        keys.append([shard.name, key])
        num_tokens += len(cached[-1].tokens)
        if progress is not None:
            progress(number + 1, len(shards), num_tokens)
    if num_tokens == 0:
        raise UserError(
            f"{source.name}: there is too little text: nothing of it is left for the {split} split.",
            fix="Give more text (data.path=…), or say what to validate on (data.validation_path=…).",
        )
    return TokenCache(cached, fingerprint_of(keys))


Encoded = Iterator[tuple[list[int], list[int] | None]]  # the ids of a document, and its mask


def _encoded(shard: Shard, tokenizer: Tokenizer) -> Encoded:
    for texts in _batches(shard.documents()):
        for ids in tokenizer.encode_batch(texts):
            yield ids, None


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists small enough for the memory and large enough for all cores."""
    batch: list[str] = []
    num_chars = 0
    for text in documents:
        batch.append(text)
        num_chars += len(text)
        if len(batch) == BATCH_DOCUMENTS or num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def write_shard(
    folder: Path,
    key: Any,
    documents: Encoded,
    dtype: str,
    facts: dict[str, int],
    report: Callable[[int], None],
    masked: bool = False,
) -> None:
    """Fill a cache folder with documents, with their masks where ``masked``; ``report`` gets the tokens so far."""
    lengths: list[int] = []
    masks: list[bytes] = []

    def write_tokens(path: Path) -> None:
        num_tokens = 0
        with path.open("wb") as file:
            for number, (ids, mask) in enumerate(documents, 1):
                file.write(np.array(ids, dtype=dtype).tobytes())
                lengths.append(len(ids))
                if mask is not None:
                    masks.append(bytes(mask))
                num_tokens += len(ids)
                if number % BATCH_DOCUMENTS == 0:
                    report(num_tokens)

    def write_lengths(path: Path) -> None:
        path.write_bytes(np.array(lengths, dtype=_LENGTH).tobytes())

    def write_masks(path: Path) -> None:
        path.write_bytes(b"".join(masks))

    files = {"tokens.bin": write_tokens, "lengths.bin": write_lengths}
    write_cache(folder, key, files | ({"mask.bin": write_masks} if masked else {}), facts)


def _map(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=dtype)
    # Seen as a plain array, of which slices are made several times faster than of a memmap.
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def token_dtype(vocab_size: int) -> str:
    """The smallest type that holds every id."""
    return "<u2" if vocab_size <= 2**16 else "<u4"
