"""Text as rows to train and validate on: tokenized, packed, of one source or a mixture; and the data module of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_pl.common.console import by_difference, progress, rank_zero_print
from nanochat_pl.data.cache.tokens import CachedShard, TokenCache, build_token_cache
from nanochat_pl.data.packing.mixture import MixedRows
from nanochat_pl.data.packing.rows import Rows, packed_rows, streamed_rows
from nanochat_pl.data.sources.base import MAX_TEXT_AT_ONCE, DataSettings, Source, SourceSettings, Split, all_at_once
from nanochat_pl.data.sources.mixture import MixedSource
from nanochat_pl.evaluation.validation import Validation, open_validation
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.training.datamodule import RowsDataModule


class TextDataModule(RowsDataModule):
    """Documents of a source, tokenized and packed for a Trainer, with validation rows of its held-out part.

    Args:
        source: of :func:`~nanochat_pl.data.sources.open.open_source`.
        tokenizer: whose ids the rows hold.
        cache: where tokens and row indices are kept; made again only where text, tokenizer or settings change.
        sequence_len: T.
        rows_per_step: rows of an optimizer step, of all processes together.
        num_steps: the rows end there.
        validation_rows: at most; fewer where the held-out text ends before.
        device_batch_size: validation rows in memory at once.
        settings: how the source is packed and shuffled; of a mixture also of each part.
        num_workers: see :class:`RowsDataModule`.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        cache: Path,
        *,
        sequence_len: int,
        rows_per_step: int,
        num_steps: int,
        validation_rows: int = 64,
        device_batch_size: int = 8,
        settings: DataSettings | None = None,
        num_workers: int | None = 0,
    ) -> None:
        parts = tokenized_parts(source, settings or DataSettings(), tokenizer, cache)
        rows = rows_of_parts(source, parts, tokenizer, cache, sequence_len, num_steps * rows_per_step)
        validation = validation_of_text(
            source, tokenizer, cache, sequence_len, validation_rows, device_batch_size=device_batch_size
        )
        super().__init__(rows, rows_per_step, num_steps, num_workers, validation)


@dataclass(frozen=True)
class TextPart:
    """A source, alone or of a mixture; without its tokens where the training begins before they are all there."""

    source: Source
    settings: SourceSettings
    tokens: TokenCache | None


def parts_with_settings(source: Source, settings: DataSettings) -> dict[str, tuple[Source, SourceSettings]]:
    """The sources of a mixture by name, each with its settings; of anything else the one that it is, without a name."""
    if isinstance(source, MixedSource):
        return {name: (part, settings.parts[name]) for name, part in source.parts.items()}
    return {"": (source, settings)}


def tokenized_parts(source: Source, settings: DataSettings, tokenizer: Tokenizer, cache: Path) -> dict[str, TextPart]:
    """The training text of each source, tokenized; of more than fits in time, while the training runs."""
    parts = {}
    for name, (part, own) in parts_with_settings(source, settings).items():
        at_once = all_at_once(own, part.shards("train"))
        if own.shuffle == "global" and not at_once:
            rank_zero_print(
                f"{part.name}: more than {MAX_TEXT_AT_ONCE / 1e9:g} GB of text, so its order is that of"
                " data.shuffle=shards: the training begins when the first files are tokenized."
            )
            own = replace(own, shuffle="shards")
        tokens = _tokenize(part, "train", tokenizer, cache) if at_once else None
        parts[name] = TextPart(part, own, tokens)
    return parts


def rows_of_parts(
    source: Source,
    parts: Mapping[str, TextPart],
    tokenizer: Tokenizer,
    cache: Path,
    sequence_len: int,
    num_rows: int,
) -> Rows | MixedRows:
    """The rows to train on; of a mixture each source has its share of them, and one at least."""
    if not isinstance(source, MixedSource):
        return _rows_of(parts[""], tokenizer, cache, sequence_len, num_rows)
    counts = zip(parts.items(), source.turns.counts(num_rows), strict=True)
    rows = {name: _rows_of(part, tokenizer, cache, sequence_len, max(count, 1)) for (name, part), count in counts}
    return MixedRows(rows, source.turns, num_rows)


def _rows_of(part: TextPart, tokenizer: Tokenizer, cache: Path, sequence_len: int, num_rows: int) -> Rows:
    settings = part.settings
    packing: dict[str, Any] = {
        "sequence_len": sequence_len,
        "mode": settings.packing_mode,
        "num_rows": num_rows,
        "buffer_documents": settings.pack_buffer_documents,
        "refill_documents": settings.pack_refill_documents,
        "shuffle": settings.shuffle,
        "seed": settings.seed,
    }
    if part.tokens is None:
        return streamed_rows(part.source.shards("train"), tokenizer, cache, **packing)
    return packed_rows(part.tokens, bos_id=tokenizer.bos_id, cache_dir=cache, **packing)


def validation_of_text(
    source: Source, tokenizer: Tokenizer, cache: Path, sequence_len: int, num_rows: int, device_batch_size: int
) -> Validation:
    """The rows to validate on, of the held-out text."""
    return open_validation(
        source,
        lambda part, enough: _tokenize(part, "val", tokenizer, cache, enough),
        tokenizer,
        cache,
        sequence_len=sequence_len,
        num_rows=num_rows,
        device_batch_size=device_batch_size,
    )


def _tokenize(
    source: Source, split: Split, tokenizer: Tokenizer, cache: Path, enough_tokens: int | None = None
) -> TokenCache:
    with progress(f"tokenizing {source.name}, {split}", len(source.shards(split)), "shards") as advance:
        report = by_difference(advance)
        tokens = build_token_cache(
            source,
            split,
            tokenizer,
            cache,
            lambda done, total, tokens: report(done, total),
            enough_tokens=enough_tokens,
        )
    announce_empty(f"{source.name}, {split}", tokens.shards)
    return tokens


def announce_empty(what: str, shards: Sequence[CachedShard]) -> None:
    num_documents = sum(shard.num_documents for shard in shards)
    if empty := num_documents - sum(int(np.count_nonzero(shard.lengths())) for shard in shards):
        rank_zero_print(f"{what}: {empty:,} of {num_documents:,} documents are empty or blank, and left out.")
