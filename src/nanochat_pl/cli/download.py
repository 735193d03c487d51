"""Fetches files of a data set from the hub, several at once, verified. What is here already is not fetched again.

nanochat-pl download data=climbmix num_shards=8
nanochat-pl download data=hub data.repo=OWNER/NAME
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_pl.cli.compose import compose
from nanochat_pl.cli.locate import cache_folder
from nanochat_pl.common.console import next_steps, say
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.settings import setting
from nanochat_pl.data.conversation_files import holds_conversations
from nanochat_pl.data.hub_download import PARALLEL
from nanochat_pl.data.hub_files import HubFiles
from nanochat_pl.data.sources import DataSettings
from nanochat_pl.training.settings import PathsSettings

# More than this is fetched only when its number of files is named.
UNASKED_BYTES = 10 * 10**9


@dataclass(frozen=True)
class DownloadConfig:
    """The root of configs/download.yaml."""

    num_shards: int | None = setting(
        None, "Training files to fetch, from the first; null: all, where they are not many.", at_least=1
    )
    parallel: int = setting(PARALLEL, "Downloads at a time.", at_least=1, at_most=64)
    refresh: bool = setting(False, "Ask what the revision means today, instead of keeping to the commit known here.")
    data: DataSettings = setting(factory=DataSettings)
    paths: PathsSettings = setting(factory=PathsSettings)


Config = DownloadConfig
HELP_KEYS = ("data.repo", "data.revision", "data.files")


def run(arguments: Sequence[str]) -> int:
    """The verb."""
    config = compose("download", DownloadConfig, arguments).config
    if config.data.name == "mixture":
        raise UserError(
            "data=mixture: is not fetched as one: say which of its sources, data=climbmix or data=hub data.repo=…",
            "With data.download=true a training fetches what it needs of all of them.",
        )
    if not config.data.is_on_hub:
        raise UserError(f"data={config.data.name}: is on this machine; there is nothing to download.")
    cache = cache_folder(config.paths)
    source = HubFiles(config.data, cache, ask_hub=True, refresh=config.refresh, with_json=True)
    num_shards = config.num_shards or config.data.num_shards or _all_shards(source)
    fetched = source.fetch(num_shards, config.parallel)
    if fetched.num_new:
        say(f"Fetched {_files(fetched.num_new)}, {fetched.new_bytes / 1e9:,.2f} GB, verified.")
    else:
        say(f"Nothing to fetch: {_files(len(fetched.paths))} are here and verified.")
    say(f"Where: {fetched.paths[0].parent}")
    telling = [fetched.paths[0], *(path for path in fetched.paths if path.suffix == ".json")]
    if any(holds_conversations(path, config.data.text_column) for path in telling):
        own = f"mixture=own mixture.tasks.conversations.NAME.repo={source.manifest.repo}"
        next_steps([("fine-tune on it", f"nanochat-pl train stage=sft {own}")])
        return 0
    say(source.describe())
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
