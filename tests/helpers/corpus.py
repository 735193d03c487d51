"""The embedded corpus, read once for all tests."""

from __future__ import annotations

from pathlib import Path

from nanochat_pl.common.paths import PathsSettings, cache_folder
from nanochat_pl.data.sources.python_docs import FOLDER, open_python_docs


def share_corpus(cache: Path) -> None:
    """Put the corpus of this machine's cache into one of a test's own: reading the packages takes a minute."""
    built = open_python_docs(cache_folder(PathsSettings())).folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    (cache / FOLDER).symlink_to(built)
