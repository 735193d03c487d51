"""Text and conversations as token ids on disk: tokenized once, read by memory map.

One folder per shard: ``tokens.bin`` (uint16 where the vocabulary allows, else uint32), ``lengths.bin`` (int32, one per
document, 0 for an empty one, so that a document keeps its number), for conversations ``mask.bin`` (uint8 per token),
and a manifest. The folder's name is made of the fingerprints of the shard and of the tokenizer, so a cache cannot be
stale, and a build that was stopped goes on with the first shard that is not there. Tokens are kept without bos: rows
put it in front.

Where a shard will be is known before it is there. So a cache may be opened while it is still being built, and be asked
for what is there already.
"""

from __future__ import annotations

import shutil
import tempfile
from array import array
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_pl.common.files import ensure_folder
from nanochat_pl.common.launch_env import usable_cpus
from nanochat_pl.data.cache.content_cache import building, fingerprint_of, read_cache, write_cache
from nanochat_pl.data.cache.tokenize import Encoder, in_order
from nanochat_pl.data.sources.base import Shard, Source, Split, is_much, too_little_text
from nanochat_pl.data.sources.on_demand import fetched_ahead
from nanochat_pl.tokenizer import Tokenizer

FORMAT = 1
_LENGTH = np.dtype("<i4")
# Each open file takes a descriptor, of which a process may have few: 256 on macOS.
_MAX_OPEN_SHARDS = 100
_open_shards: OrderedDict[CachedShard, None] = OrderedDict()  # of all caches of this process, the last read last

Progress = Callable[[int, int, int], None]  # shards done, shards in all, tokens so far


class CachedShard:
    """One shard in the cache, opened when it is first read."""

    def __init__(self, name: str, folder: Path, dtype: str, masked: bool = False) -> None:
        self.name, self.folder, self.dtype, self.masked = name, folder, dtype, masked
        self._open: tuple[np.ndarray, np.ndarray, np.ndarray | None] | None = None

    @property
    def tokens(self) -> np.ndarray:
        """All documents one after the other, uint16 or uint32 (num_tokens,), by memory map."""
        return self._opened()[0]

    @property
    def offsets(self) -> np.ndarray:
        """int64 (num_documents + 1,): document i has the tokens offsets[i] … offsets[i + 1] - 1."""
        return self._opened()[1]

    @property
    def mask(self) -> np.ndarray | None:
        """uint8 (num_tokens,), 1 where a token is trained on; None: all are."""
        return self._opened()[2]

    @property
    def num_documents(self) -> int:
        return (self.folder / "lengths.bin").stat().st_size // _LENGTH.itemsize

    @property
    def num_tokens(self) -> int:
        return (self.folder / "tokens.bin").stat().st_size // np.dtype(self.dtype).itemsize

    def lengths(self) -> np.ndarray:
        """int32 (num_documents,): tokens per document, without bos."""
        return np.fromfile(self.folder / "lengths.bin", dtype=_LENGTH)

    def close(self) -> None:
        """Let go of the files; reading opens them again."""
        self._open = None

    def _opened(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        if self._open is None:
            offsets = np.concatenate([[0], np.cumsum(self.lengths(), dtype=np.int64)])
            tokens = _map(self.folder / "tokens.bin", self.dtype)
            mask = _map(self.folder / "mask.bin", "u1") if self.masked else None
            assert len(tokens) == offsets[-1] and (mask is None or len(mask) == len(tokens)), self.folder
            self._open = tokens, offsets, mask
        return self._open

    def __getstate__(self) -> dict[str, Any]:
        """Sent to another process, it is opened there again: the tokens stay in the file."""
        return self.__dict__ | {"_open": None}


class TokenCache:
    """All documents of a split as tokens, by number: those of the first shard, then those of the second …

    Attributes:
        shards: in the source's order. Of a cache that is being built, the first ones are there.
        masked: whether the shards have masks.
        fingerprint: changes with any token of any document.
    """

    def __init__(self, shards: Sequence[CachedShard], fingerprint: str) -> None:
        self.shards = list(shards)
        self.fingerprint = fingerprint
        self.masked = any(shard.masked for shard in self.shards)
        self._first_documents = np.zeros(1, dtype=np.int64)  # of the shards that were asked for so far, and the next

    @property
    def lengths(self) -> np.ndarray:
        """int32 (num_documents,): tokens of every document, without bos."""
        return np.concatenate([shard.lengths() for shard in self.shards])

    @property
    def num_documents(self) -> int:
        return self.first_document(len(self.shards))

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    def first_document(self, shard: int) -> int:
        """The number of a shard's first document. The shards before it must be there."""
        while len(self._first_documents) <= shard:
            following = self._first_documents[-1] + self.shards[len(self._first_documents) - 1].num_documents
            self._first_documents = np.append(self._first_documents, following)
        return int(self._first_documents[shard])

    def shard_of(self, document: int) -> int:
        """The number of the shard that holds a document."""
        known = len(self._first_documents) - 1
        while document >= self._first_documents[-1] and known < len(self.shards):
            known += 1
            self.first_document(known)
        if not 0 <= document < self._first_documents[-1]:
            raise IndexError(f"document {document} of {self._first_documents[-1]}")
        return int(np.searchsorted(self._first_documents, document, side="right")) - 1

    def locate(self, document: int) -> tuple[CachedShard, int]:
        """The shard that holds a document, and the document's number in it."""
        shard = self.shard_of(document)
        return self.open_shard(shard), document - int(self._first_documents[shard])

    def open_shard(self, number: int) -> CachedShard:
        """A shard that is about to be read. Of those open in this process, the one read longest ago is closed."""
        shard = self.shards[number]
        _open_shards[shard] = None
        _open_shards.move_to_end(shard)
        if len(_open_shards) > _MAX_OPEN_SHARDS:
            _open_shards.popitem(last=False)[0].close()
        return shard

    def positions(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each document the number of its shard, and where in that shard's tokens it begins."""
        if len(documents):
            self.shard_of(int(documents.max()))
        shards = np.searchsorted(self._first_documents, documents, side="right") - 1
        starts = np.empty(len(documents), dtype=np.int64)
        for number in np.unique(shards).tolist():
            here = shards == number
            starts[here] = self.open_shard(number).offsets[documents[here] - self._first_documents[number]]
        return shards, starts

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens start … stop - 1 of a document, without bos (a view of the file)."""
        shard, number = self.locate(document)
        first = int(shard.offsets[number])
        return shard.tokens[first + start : int(shard.offsets[number + 1]) if stop is None else first + stop]


@dataclass(frozen=True)
class ShardToBuild:
    """A shard of a source, and where its tokens are or will be."""

    shard: Shard
    cached: CachedShard
    key: dict[str, Any]

    def is_there(self) -> bool:
        """Whether the shard is in the cache, all its files as they were written."""
        return read_cache(self.cached.folder, self.key) is not None


def token_cache_to_build(
    shards: Sequence[Shard], tokenizer: Tokenizer, cache_dir: Path
) -> tuple[TokenCache, list[ShardToBuild]]:
    """The cache of some shards, whether they are there or not, and what :func:`tokenized` needs to build them."""
    dtype = token_dtype(tokenizer.vocab_size)
    to_build = []
    for shard in shards:
        key = {"format": FORMAT, "tokenizer": tokenizer.fingerprint, "shard": shard.fingerprint}
        cached = CachedShard(shard.name, cache_dir / "tokens" / fingerprint_of(key)[:32], dtype)
        to_build.append(ShardToBuild(shard, cached, key))
    fingerprint = fingerprint_of([[each.shard.name, each.key] for each in to_build])
    return TokenCache([each.cached for each in to_build], fingerprint), to_build


def tokenized(
    shards: Sequence[ShardToBuild], tokenizer: Tokenizer, num_threads: int | None = None
) -> Generator[CachedShard, None, None]:
    """Shard after shard, each once it is in the cache; the next one is worked on meanwhile.

    Raises:
        UserError: what the source says of a file, or the disk. Shards that are done stay done.
    """

    def build(to_build: ShardToBuild, encode: Encoder) -> CachedShard:
        if not to_build.is_there():
            with building(to_build.cached.folder, encode.check):
                # Another process may have built it meanwhile, or the thread that had an equal shard.
                if not to_build.is_there():
                    documents = ((ids, None) for ids in encode(to_build.shard.documents()))
                    write_shard(to_build.cached.folder, to_build.key, documents, to_build.cached.dtype, {})
        return to_build.cached

    def fetch(to_build: ShardToBuild) -> None:
        if to_build.shard.fetch is not None and not to_build.is_there():
            to_build.shard.fetch()

    dtype = token_dtype(tokenizer.vocab_size)
    coming = fetched_ahead(shards, fetch) if any(each.shard.fetch for each in shards) else shards
    return in_order(coming, build, tokenizer.encode_array, dtype, num_threads or usable_cpus())


def build_token_cache(
    source: Source,
    split: Split,
    tokenizer: Tokenizer,
    cache_dir: Path,
    progress: Progress | None = None,
    num_threads: int | None = None,
    enough_tokens: int | None = None,
) -> TokenCache:
    """Tokenize a split, or find it tokenized.

    Args:
        source, split: which documents. tokenizer: encodes them. cache_dir: the cache of all runs (``paths.cache``).
        progress: called with the shards done, the shards in all, and the tokens so far. num_threads: that encode; None:
        as many as there are cores. enough_tokens: of a split of very much text (see
        :func:`~nanochat_pl.data.sources.base.is_much`) the first shards
            that hold so many, and no more; None: all of it.

    Raises:
        UserError: the split has no text, or what the source says of a file. Shards that are done stay done.
    """
    listed = source.shards(split)
    cache, to_build = token_cache_to_build(listed, tokenizer, cache_dir)
    enough = enough_tokens if is_much(listed) else None
    num_tokens, done = 0, 0
    with closing(tokenized(to_build, tokenizer, num_threads)) as shards:
        for done, shard in enumerate(shards, 1):
            num_tokens += shard.num_tokens
            if progress is not None:
                progress(done, len(to_build), num_tokens)
            if enough is not None and num_tokens >= enough:
                break
    if num_tokens == 0:
        raise too_little_text(source, split)
    return cache if done == len(listed) else token_cache_to_build(listed[:done], tokenizer, cache_dir)[0]


Encoded = Iterator[tuple[Sequence[int] | np.ndarray, Sequence[int] | None]]  # the ids of a document, and its mask


def write_shard(
    folder: Path,
    key: Any,
    documents: Encoded,
    dtype: str,
    facts: dict[str, int],
    masked: bool = False,
) -> None:
    """Fill a cache folder with documents, with their masks where ``masked``."""
    lengths = array("i")

    def write_tokens(path: Path) -> None:
        with path.open("wb") as file:
            for ids, mask in documents:
                file.write(np.asarray(ids, dtype=dtype).data)
                lengths.append(len(ids))
                if mask is not None:
                    masks.write(bytes(mask))

    def write_lengths(path: Path) -> None:
        path.write_bytes(np.array(lengths, dtype=_LENGTH).tobytes())

    def write_masks(path: Path) -> None:
        masks.seek(0)
        with path.open("wb") as file:
            shutil.copyfileobj(masks, file)

    files = {"tokens.bin": write_tokens, "lengths.bin": write_lengths}
    # One file is written after the other: until it is its turn, the mask waits beside them.
    with tempfile.TemporaryFile(dir=ensure_folder(folder)) as masks:
        write_cache(folder, key, files | ({"mask.bin": write_masks} if masked else {}), facts)


def _map(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=dtype)
    # Seen as a plain array, of which slices are made several times faster than of a memmap.
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def token_dtype(vocab_size: int) -> str:
    """The smallest type that holds every id."""
    return "<u2" if vocab_size <= 2**16 else "<u4"
