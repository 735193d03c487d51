"""Fetches files of a data set from the hub, several at once, verified. What is here already is not fetched again.

nanochat-pl download data=climbmix num_shards=8
nanochat-pl download data=hub data.repo=OWNER/NAME
nanochat-pl download task=gsm8k
nanochat-pl download eval_bundle=true
nanochat-pl download tokenizers=true
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_pl.common.console import next_steps, rank_zero_print
from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.common.paths import PathsSettings, cache_folder
from nanochat_pl.common.schema import setting
from nanochat_pl.config.compose import compose
from nanochat_pl.data.conversations.files import CONVERSATION_SUFFIXES, holds_conversations
from nanochat_pl.data.hub.core_bundle import fetch_eval_bundle
from nanochat_pl.data.hub.download import PARALLEL, Fetched, fetch_files
from nanochat_pl.data.hub.manifest import open_manifest
from nanochat_pl.data.sources.auto import with_choice
from nanochat_pl.data.sources.base import DataSettings
from nanochat_pl.data.sources.hub import HubFiles, files_of_format, key_of_cache, typed_keys
from nanochat_pl.tasks.registry import all_tasks
from nanochat_pl.tokenizer.comparison import fetch_others

# More than this is fetched only when its number of files is named.
UNASKED_BYTES = 10 * 10**9


@dataclass(frozen=True)
class DownloadConfig:
    """The root of configs/download.yaml."""

    task: str | None = setting(None, "Fetch the data set of this task, for instance gsm8k, instead of data.")
    repo: str | None = setting(None, "With task: another data set of the same columns, OWNER/NAME.")
    config: str | None = setting(None, "With task: another part of the data set.")
    revision: str | None = setting(None, "With task: branch, tag or commit; null: main.")
    eval_bundle: bool = setting(False, "Fetch the evaluation bundle of CORE instead of data.")
    tokenizers: bool = setting(
        False, "Fetch GPT-2's and GPT-4's tokenizers instead, to compare with, into tiktoken's cache."
    )
    num_shards: int | None = setting(
        None, "Training files to fetch, from the first; null: all, where they are not many.", at_least=1
    )
    parallel: int = setting(PARALLEL, "Downloads at a time.", at_least=1, at_most=64)
    refresh: bool = setting(False, "Ask what the revision means today, instead of keeping to the commit known here.")
    data: DataSettings = setting(factory=DataSettings)
    paths: PathsSettings = setting(factory=PathsSettings)


Config = DownloadConfig
HELP_KEYS = ("data.repo", "data.revision", "data.files")
# What has a meaning where data alone is fetched, and with task only.
_OF_DATA, _OF_TASK = ("num_shards", "data"), ("repo", "config", "revision")


def run(arguments: Sequence[str]) -> int:
    """The command."""
    config = compose_download(arguments)
    if config.eval_bundle:
        return _fetch_eval_bundle(config)
    if config.tokenizers:
        return _fetch_tokenizers()
    return _fetch_data(config) if config.task is None else _fetch_task(config, config.task)


def compose_download(arguments: Sequence[str]) -> DownloadConfig:
    """What the command line asks for, checked."""
    keys = {text.lstrip("+").partition("=")[0] for text in arguments}
    other = bool(keys & {"task", "eval_bundle", "tokenizers"})
    if not other:  # said first: without task there is no data set's name either
        _refuse(keys, _OF_TASK, "without task", "Name what to fetch: task=NAME; or data=hub data.repo=OWNER/NAME.")
    # The group data has to be chosen all the same, and the usual choice asks for the name of a data set.
    besides = [] if not other or any(_is_of(key, ("data",)) for key in keys) else ["data=python_docs"]
    config = compose("download", DownloadConfig, [*arguments, *besides]).config
    _require_one_thing(config, keys)
    return config


def _is_of(key: str, names: Sequence[str]) -> bool:
    return key.partition(".")[0] in names


def _require_one_thing(config: DownloadConfig, keys: Collection[str]) -> None:
    """Raise :class:`UserError` for keys, of the command line, that have no meaning beside others."""
    things = {"task": config.task is not None, "eval_bundle": config.eval_bundle, "tokenizers": config.tokenizers}
    chosen = [name for name, is_asked in things.items() if is_asked]
    if len(chosen) > 1:
        raise UserError(f"{', '.join(chosen)}: one thing at a time.", "Run the command for each.")
    asked = chosen[0] if chosen else ""
    nothing_else = (*_OF_DATA, *_OF_TASK)
    idle = {
        "task": _OF_DATA,
        "eval_bundle": nothing_else,
        "tokenizers": (*nothing_else, "parallel", "refresh", "paths"),
        "": _OF_TASK,
    }[asked]
    _refuse(keys, idle, f"with {asked}" if asked else "without task")


def _refuse(keys: Collection[str], idle: Sequence[str], beside: str, fix: str = "") -> None:
    if problems := [f"{key}: has no meaning {beside}." for key in sorted(keys) if _is_of(key, idle)]:
        raise UserError(problems, fix)


def _fetch_eval_bundle(config: DownloadConfig) -> int:
    folder, is_new = fetch_eval_bundle(cache_folder(config.paths), refresh=config.refresh)
    rank_zero_print("Fetched the evaluation bundle." if is_new else "Nothing to fetch: the evaluation bundle is here.")
    rank_zero_print(f"Where: {folder}")
    return _measure_next("core", cache_folder(config.paths))


def _measure_next(suite: str, cache: Path) -> int:
    keys = typed_keys({"suites": f"[{suite}]"} | key_of_cache(cache))
    next_steps([("measure a model on it", f"nanochat-pl evaluate {keys}")])
    return 0


def _fetch_tokenizers() -> int:
    folder, fetched = fetch_others()
    rank_zero_print(
        f"Fetched the tokenizers of {' and '.join(fetched)}." if fetched else "Nothing to fetch: they are here."
    )
    rank_zero_print(f"Where: {folder} (TIKTOKEN_CACHE_DIR)")
    next_steps([("compare a run's tokenizer with them", "nanochat-pl evaluate 'suites=[tokenizer]'")])
    return 0


def _fetch_task(config: DownloadConfig, name: str) -> int:
    """The files of a task's data set: all its splits."""
    kind = all_tasks().get(name)
    if kind is None:
        raise UserError(f"task={name}: there is no such task; {did_you_mean(name, all_tasks())}")
    names = {field.name for field in dataclasses.fields(kind.settings)}
    given = {key: value for key in _OF_TASK if (value := getattr(config, key)) is not None}
    if problems := [f"{key}: the data of {name} has no such part." for key in given if key not in names]:
        raise UserError(problems)
    settings = kind.settings(**given)
    repo = getattr(settings, "repo", None)
    if repo is None:
        raise UserError(f"task={name}: is made on this machine; there is nothing to download.")
    cache = cache_folder(config.paths)
    manifest = open_manifest(repo, getattr(settings, "revision", None) or "main", cache, config.refresh)
    pattern = getattr(settings, "files", None)
    wanted = files_of_format(manifest, pattern, CONVERSATION_SUFFIXES, f"task={name}: files")
    if not wanted:
        raise UserError(f"task={name}: no file of {repo} ends with {' or '.join(CONVERSATION_SUFFIXES)}.")
    fetched = fetch_files(manifest, wanted, cache, config.parallel)
    _say_fetched(fetched)
    if not kind.cls.has_training_part:
        return _measure_next("chatcore", cache)
    keys = {f"mixture.tasks.{name}.{key}": value for key, value in given.items()} or {f"mixture.tasks.{name}": "{}"}
    next_steps([("train on it", f"nanochat-pl train stage=sft {typed_keys(keys | key_of_cache(cache))}")])
    return 0


def _say_fetched(fetched: Fetched) -> None:
    if fetched.num_new:
        rank_zero_print(f"Fetched {_files(fetched.num_new)}, {fetched.new_bytes / 1e9:,.2f} GB, verified.")
    else:
        rank_zero_print(f"Nothing to fetch: {_files(len(fetched.paths))} are here and verified.")
    rank_zero_print(f"Where: {fetched.paths[0].parent}")


def _fetch_data(config: DownloadConfig) -> int:
    if config.data.name == "mixture":
        raise UserError(
            "data=mixture: is not fetched as one: say which of its sources, data=climbmix or data=hub data.repo=…",
            "With data.download=true a training fetches what it needs of all of them.",
        )
    data = with_choice(config.data, "web")
    if not data.is_on_hub:
        raise UserError(f"data={data.name}: is on this machine; there is nothing to download.")
    cache = cache_folder(config.paths)
    source = HubFiles(data, cache, ask_hub=True, refresh=config.refresh, with_json=True)
    num_shards = config.num_shards or data.num_shards or _all_shards(source)
    fetched = source.fetch(num_shards, config.parallel)
    _say_fetched(fetched)
    telling = [fetched.paths[0], *(path for path in fetched.paths if path.suffix == ".json")]
    if any(holds_conversations(path, data.text_column) for path in telling):
        chosen = {"repo": source.manifest.repo, "revision": data.revision, "files": data.files}
        own = {f"mixture.tasks.conversations.NAME.{key}": value for key, value in chosen.items() if value is not None}
        keys = typed_keys({"mixture": "own"} | own | key_of_cache(cache))
        next_steps([("fine-tune on it", f"nanochat-pl train stage=sft {keys}")])
        return 0
    rank_zero_print(source.describe())
    next_steps([("train on it", source.train_command())])
    return 0


def _all_shards(source: HubFiles) -> int:
    size = sum(file.bytes for file in source.files_of(len(source.train_files)))
    if size > UNASKED_BYTES:
        raise UserError(
            f"num_shards: is missing; all {len(source.train_files):,} files of {source.manifest.repo} have "
            f"{size / 1e9:,.0f} GB.",
            "Say how many, for instance num_shards=8.",
        )
    return len(source.train_files)


def _files(number: int) -> str:
    return f"{number:,} file{'s' if number > 1 else ''}"
