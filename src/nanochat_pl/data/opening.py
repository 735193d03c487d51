"""From the settings of the config group ``data`` to the source that they name."""

from __future__ import annotations

from pathlib import Path

from nanochat_pl.common.console import say
from nanochat_pl.data.hub_files import HubFiles
from nanochat_pl.data.local_files import LocalFiles
from nanochat_pl.data.mixed_rows import Turns
from nanochat_pl.data.mixed_source import MixedSource
from nanochat_pl.data.python_docs import open_python_docs
from nanochat_pl.data.sources import DataSettings, Source, SourceSettings


def open_source(settings: DataSettings, cache_dir: Path, tokens_needed: int | None = None) -> Source:
    """Open the source that the settings name. Of a hub's data set that is what has been downloaded of it.

    Args:
        settings: the config group ``data``; the network is used with ``data.download=true`` only.
        cache_dir: where a source may keep what it makes or has found out (``paths.cache``).
        tokens_needed: tokens that the plan trains on. Where what is here falls short of them, it is said, with the
            command that fetches the rest.

    Raises:
        UserError: no file matches, a suffix or a column is unknown, a file cannot be read; nothing is downloaded yet;
            two sources of a mixture share a file.
    """
    if settings.name != "mixture":
        return _open_one("data", settings, cache_dir, tokens_needed)
    turns = Turns([part.weight for part in settings.parts.values()])
    parts = {}
    for (name, part), share in zip(settings.parts.items(), turns.shares, strict=True):
        needed = None if tokens_needed is None else round(tokens_needed * share)
        parts[name] = _open_one(f"data.sources.{name}", part, cache_dir, needed)
    return MixedSource(parts, turns)


def _open_one(key: str, settings: SourceSettings, cache_dir: Path, tokens_needed: int | None) -> Source:
    if settings.name == "python_docs":
        return open_python_docs(cache_dir)
    if settings.name == "local":
        return LocalFiles(settings, cache_dir, key)
    source = HubFiles(settings, cache_dir, ask_hub=settings.download)
    if settings.download:
        source.fetch(max(source.num_shards_for(tokens_needed), 1))
    for line in source.shortfall(tokens_needed):
        say(line)
    return source
