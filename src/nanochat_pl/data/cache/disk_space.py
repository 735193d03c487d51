"""Whether the disk of the caches has room for the tokens that a stage is going to make."""

from __future__ import annotations

from pathlib import Path

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import free_bytes
from nanochat_pl.common.text_amounts import BYTES_PER_TOKEN, shards_for, token_cache_bytes
from nanochat_pl.data.cache.tokens import token_cache_to_build
from nanochat_pl.data.sources.base import Source, SourceSettings, all_at_once
from nanochat_pl.tokenizer import Tokenizer


def bytes_to_make(
    source: Source,
    settings: SourceSettings,
    tokenizer: Tokenizer,
    cache_dir: Path,
    *,
    num_tokens: float,
    sequence_len: int,
) -> int:
    """About how many bytes the tokens of a source's training text take that are not in the cache yet, with the index of
    their rows.

    Args:
        source, settings: one source, no mixture.
        num_tokens: that are trained on; of text that is tokenized while the training runs no more is made.
        sequence_len: T.
    """
    shards = source.shards("train")
    if not all_at_once(settings, shards):
        tokens = ((shard.text_bytes or 0) / BYTES_PER_TOKEN for shard in shards)
        shards = shards[: shards_for(num_tokens, settings.packing_mode == "crop", tokens)]
    _, to_build = token_cache_to_build(shards, tokenizer, cache_dir)
    missing = sum(
        (each.shard.text_bytes or 0) / BYTES_PER_TOKEN
        for each in to_build
        if not (each.cached.folder / "manifest.json").exists()
    )
    return token_cache_bytes(missing, tokenizer.vocab_size, sequence_len)


def require_cache_room(cache_dir: Path, num_bytes: int) -> None:
    """Raise :class:`UserError` where the disk of the caches has less room than so many bytes."""
    free = free_bytes(cache_dir)
    if num_bytes > free:
        raise UserError(
            f"paths.cache={cache_dir}: the tokens of the text and the index of their rows take about"
            f" {num_bytes / 2**20:,.1f} MiB more, the disk has {free / 2**20:,.1f} MiB free.",
            "Free some space, or set paths.cache=… to a folder on another disk; a shorter training on a hub's data set"
            " takes less.",
        )
