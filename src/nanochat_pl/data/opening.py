"""From the settings of the config group ``data`` to the source that they name."""

from __future__ import annotations

from pathlib import Path

from nanochat_pl.data.local_files import LocalFiles
from nanochat_pl.data.python_docs import open_python_docs
from nanochat_pl.data.sources import DataSettings, Source


def open_source(settings: DataSettings, cache_dir: Path) -> Source:
    """Open the source that the settings name.

    Args:
        settings: the config group ``data``.
        cache_dir: where a source may keep what it makes or has found out (``paths.cache``).

    Raises:
        UserError: no file matches, a suffix or a column is unknown, a file cannot be read.
    """
    return LocalFiles(settings, cache_dir) if settings.name == "local" else open_python_docs(cache_dir)
