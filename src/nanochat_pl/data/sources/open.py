"""From the settings of the config group ``data`` to the source that they name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.files import read_object, write_json
from nanochat_pl.common.schema import build, to_plain
from nanochat_pl.data.packing.mixture import MixtureSchedule
from nanochat_pl.data.sources.base import DataSettings, Source, SourceSettings
from nanochat_pl.data.sources.custom import open_custom
from nanochat_pl.data.sources.hub import ChosenFiles, HubFiles
from nanochat_pl.data.sources.local import LocalFiles
from nanochat_pl.data.sources.mixture import MixedSource
from nanochat_pl.data.sources.run_corpus import RunCorpus


def open_source(
    settings: DataSettings,
    cache_dir: Path,
    tokens_needed: int | None = None,
    chosen: Mapping[str, ChosenFiles] | None = None,
    corpus: RunCorpus | None = None,
) -> Source:
    """Open the source that the settings name. Of a hub's data set that is what has been downloaded of it; with
    ``data.download=true`` it is what the plan takes, and what is missing is fetched when it is read.

    Args:
        settings: the config group ``data``, of data=auto what it comes to; the network is used with
            ``data.download=true`` only.
        cache_dir: where a source may keep what it makes or has found out (``paths.cache``).
        tokens_needed: tokens that the plan trains on. Where what is here falls short of them, it is said, with the
            command that fetches the rest.
        chosen: of a training that goes on, the files of hubs that it was begun with, see :func:`read_chosen`.
        corpus: which corpus of docstrings a run has; None: that of the packages installed now.

    Raises:
        UserError: no file matches, a suffix or a column is unknown, a file cannot be read; nothing is downloaded yet;
            two sources of a mixture share a file.
    """
    chosen, corpus = chosen or {}, corpus or RunCorpus(cache_dir)
    if settings.name != "mixture":
        return _open_one("data", settings, cache_dir, tokens_needed, chosen, corpus)
    turns = MixtureSchedule([part.weight for part in settings.parts.values()])
    parts = {}
    for (name, part), share in zip(settings.parts.items(), turns.shares, strict=True):
        needed = None if tokens_needed is None else round(tokens_needed * share)
        parts[name] = _open_one(f"data.sources.{name}", part, cache_dir, needed, chosen, corpus)
    return MixedSource(parts, turns)


def write_chosen(path: Path, source: Source) -> None:
    """Record the files of hubs that a source has, by the key of each: ``data``, or ``data.sources.NAME`` of a mixture.

    A training that goes on has the same ones then, also where more have been fetched meanwhile.
    """
    parts = (
        {f"data.sources.{name}": part.source for name, part in source.parts.items()}
        if isinstance(source, MixedSource)
        else {"data": source}
    )
    write_json(path, {key: to_plain(part.chosen()) for key, part in parts.items() if isinstance(part, HubFiles)})


def read_chosen(path: Path) -> dict[str, ChosenFiles]:
    """What :func:`write_chosen` has recorded; nothing where there is no such file.

    Raises:
        UserError: it cannot be read.
    """
    if not path.is_file():
        return {}
    fix = "Bring it back from a copy; or begin the stage again, with resume=never."
    return {key: build(ChosenFiles, values, f"{path}: {key}") for key, values in read_object(path, fix).items()}


def _open_one(
    key: str,
    settings: SourceSettings,
    cache_dir: Path,
    tokens_needed: int | None,
    chosen: Mapping[str, ChosenFiles],
    corpus: RunCorpus,
) -> Source:
    assert settings.name != "auto", "choose_data says what it comes to"
    if settings.name == "python_docs":
        return corpus.reopened()
    if settings.name == "local":
        return LocalFiles(settings, cache_dir, key)
    if settings.name == "custom":
        return open_custom(settings, key)
    source = HubFiles(
        settings,
        cache_dir,
        ask_hub=bool(settings.download),
        chosen=chosen.get(key),
        key=key,
        tokens_needed=tokens_needed,
    )
    if settings.download:
        source.fetch_on_demand(tokens_needed)
    for line in source.shortfall(tokens_needed):
        rank_zero_print(line)
    return source
