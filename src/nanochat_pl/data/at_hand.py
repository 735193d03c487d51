"""How much text lies on this machine, without reading, building or downloading any."""

from __future__ import annotations

from pathlib import Path

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.file_formats import check_file
from nanochat_pl.data.file_reading import format_of, parquet_facts, reading
from nanochat_pl.data.hub_files import BYTES_PER_TOKEN, COMPRESSED_SHARE, HubFiles
from nanochat_pl.data.local_files import choose_files
from nanochat_pl.data.python_docs import built_python_docs
from nanochat_pl.data.sources import DataSettings, SourceSettings


def tokens_at_hand(settings: DataSettings, cache_dir: Path) -> int | None:
    """About how many tokens there are to train on, of a mixture those of all sources; None where that is not known.

    Args:
        settings: the config group ``data``.
        cache_dir: ``paths.cache``; nothing is written there.

    Raises:
        UserError: data.path names no file, or one that cannot be read.
    """
    if settings.name == "mixture":
        known = tokens_by_source(settings, cache_dir).values()
        return None if None in known else sum(filter(None, known))
    return _tokens_of("data", settings, cache_dir)


def tokens_by_source(settings: DataSettings, cache_dir: Path) -> dict[str, int | None]:
    """As :func:`tokens_at_hand`, of each source of a mixture."""
    return {name: _tokens_of(f"data.sources.{name}", part, cache_dir) for name, part in settings.parts.items()}


def _tokens_of(key: str, settings: SourceSettings, cache_dir: Path) -> int | None:
    if settings.name != "mixture":
        return _of_source("data", settings, cache_dir)
    parts = [_of_source(f"data.sources.{name}", part, cache_dir) for name, part in settings.parts.items()]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _of_source(key: str, settings: SourceSettings, cache_dir: Path) -> int | None:
    if settings.name == "python_docs":
        corpus = built_python_docs(cache_dir)
        return None if corpus is None else int(corpus.manifest["splits"]["train"]["bytes"] / BYTES_PER_TOKEN)
    if settings.name == "local":
        chosen = choose_files(settings, key)
        held_out = settings.validation_fraction if chosen.by_hash else 0.0
        num_bytes = sum(_text_bytes(path, settings.text_column) for path in chosen.train.values())
        return int(num_bytes * (1 - held_out) / BYTES_PER_TOKEN)
    try:
        return int(HubFiles(settings, cache_dir).tokens_here())
    except UserError:  # nothing of it has been downloaded yet
        return None


def _text_bytes(path: Path, text_column: str) -> float:
    """Bytes of text in a file: of a table what its column has, of compressed lines by the usual share."""
    check_file(path, text_column)
    if format_of(path) == ".parquet":
        return parquet_facts(path)[2][text_column]
    with reading(path):
        return path.stat().st_size / (COMPRESSED_SHARE if path.suffix in (".gz", ".zst") else 1)
