"""``data=auto``: the docstrings of this machine where they are text enough for a plan, else a data set of the hub.

Which of the two it is follows from the plan alone; what a run was begun with is recorded beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from nanochat_pl.common.console import by_difference, progress
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_json, write_json
from nanochat_pl.common.text_amounts import KNOWN_SETS
from nanochat_pl.data.sources.base import DataSettings
from nanochat_pl.data.sources.docstrings import installed_packages, python_files
from nanochat_pl.data.sources.python_docs import PythonDocs, built_python_docs, open_python_docs
from nanochat_pl.data.sources.run_corpus import RunCorpus
from nanochat_pl.data.sources.token_counts import tokens_of_docstrings
from nanochat_pl.planning.horizon import MAX_EPOCHS

# More than the docstrings of any set of packages: a plan beyond four epochs of so many is not held against them.
MAX_DOCSTRING_TOKENS = 100e6
Choice = Literal["docs", "web"]


def choose_data(
    settings: DataSettings,
    tokens_planned: Callable[[int | None], int],
    cache_dir: Path,
    corpus: RunCorpus | None = None,
) -> DataSettings:
    """The settings that data=auto comes to; any others as they are.

    Args:
        tokens_planned: tokens that the plan trains on if so many are at hand; None: nobody knows how many.
        cache_dir: ``paths.cache``. The corpus of docstrings is built there where the choice depends on it.
        corpus: which one a run has; None: that of the packages installed now.

    Raises:
        UserError: the corpus cannot be built, or the plan is wrong.
    """
    if settings.name != "auto":
        return settings
    return with_choice(settings, _choice(tokens_planned, cache_dir, corpus))


def with_choice(settings: DataSettings, choice: Choice) -> DataSettings:
    """The settings of data=auto with one of its two sources; any others as they are.

    The data set's own settings, its packing among them, are those of ``data=climbmix``; name that one to set others.
    It is fetched while the training runs, unless ``data.download=false`` forbids it.
    """
    if settings.name != "auto":
        return settings
    if choice == "docs":
        return replace(settings, name="python_docs", num_shards=None, download=None)
    return replace(
        settings,
        name="climbmix",
        repo=KNOWN_SETS["climbmix"].repo,
        files=KNOWN_SETS["climbmix"].files,
        shuffle="shards" if settings.shuffle == "global" else settings.shuffle,
        long_documents="crop",
        download=settings.download is not False,
    )


def choice_of(settings: DataSettings) -> Choice:
    """Which of the two sources these settings, made by :func:`choose_data`, are of."""
    return "docs" if settings.name == "python_docs" else "web"


def explain_choice(
    chosen: DataSettings,
    tokens_planned: Callable[[int | None], int],
    cache_dir: Path,
    run_corpus: RunCorpus | None = None,
) -> str:
    """One line for people: what data=auto came to, and why."""
    corpus = (run_corpus and run_corpus.kept) or built_python_docs(cache_dir)
    tokens = None if corpus is None else tokens_of_docstrings(corpus)
    needed = tokens_planned(tokens)
    about = "" if tokens is None else f", of which there are about {tokens:,}"
    if choice_of(chosen) == "docs":
        why = f"the plan's {needed:,} tokens are {MAX_EPOCHS:g} epochs or less of the docstrings here{about}"
    else:
        why = f"the plan's {needed:,} tokens are more than {MAX_EPOCHS:g} epochs of the docstrings here{about}"
    return f"data=auto: {chosen.name}, as {why}."


def write_choice(path: Path, chosen: DataSettings) -> None:
    """Record what a stage is begun with."""
    write_json(path, {"choice": choice_of(chosen)})


def read_choice(path: Path) -> Choice | None:
    """What a stage was begun with; None where that is not recorded.

    Raises:
        UserError: the record is damaged.
    """
    if not path.is_file():
        return None
    told = read_json(path)
    choice = told.get("choice") if isinstance(told, dict) else None
    if choice not in get_args(Choice):
        raise UserError(
            f"{path}: does not say which data the stage was begun with.", "Begin a new run: run=NEW or resume=never."
        )
    return choice


def _choice(tokens_planned: Callable[[int | None], int], cache_dir: Path, corpus: RunCorpus | None) -> Choice:
    if tokens_planned(None) > MAX_EPOCHS * MAX_DOCSTRING_TOKENS:
        return "web"
    tokens = tokens_of_docstrings((corpus and corpus.kept) or _counted(cache_dir))
    return "docs" if tokens_planned(tokens) <= MAX_EPOCHS * tokens else "web"


def _counted(cache_dir: Path) -> PythonDocs:
    corpus = built_python_docs(cache_dir)
    if corpus is not None:
        return corpus
    num_files = sum(len(python_files(package)) for package in installed_packages()[0])
    with progress("reading docstrings", num_files, "files") as advance:
        return open_python_docs(cache_dir, progress=by_difference(advance))
