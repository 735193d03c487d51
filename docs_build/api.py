"""A hook of mkdocs: the page of the public names of nanochat_pl, which mkdocstrings fills from their docstrings."""

from __future__ import annotations

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import nanochat_pl
from nanochat_pl import inspection, ledger


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page to those of docs/."""
    lines = [
        "# Python API\n",
        "What `from nanochat_pl import …` gives. All other modules may change between versions; those that the "
        "notebooks use stand below.\n",
        *entries(nanochat_pl),
        "## nanochat_pl.inspection\n\nLooking inside a model and at its tokens.\n",
        *entries(inspection),
        "## nanochat_pl.ledger\n\nWhat was trained, a line for every end of a stage.\n",
        *entries(ledger),
    ]
    files.append(File.generated(config, "reference/api.md", content="\n".join(lines)))
    return files


def entries(module: object) -> list[str]:
    """An order to mkdocstrings for each public name, where it is defined."""
    names = [name for name in module.__all__ if not name.startswith("__") and not name.isupper()]  # type: ignore[attr-defined]
    things = [getattr(module, name) for name in names]
    return [f"::: {each.__module__}.{each.__qualname__}\n" for each in things]
