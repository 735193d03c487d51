"""How much text lies on this machine, without tokenizing or downloading any."""

from __future__ import annotations

from pathlib import Path

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.text_amounts import BYTES_PER_TOKEN, bytes_per_token, known_set
from nanochat_pl.data.sources.base import DataSettings, SourceSettings
from nanochat_pl.data.sources.custom import open_custom
from nanochat_pl.data.sources.hub import HubFiles
from nanochat_pl.data.sources.local import choose_files, text_bytes
from nanochat_pl.data.sources.python_docs import PythonDocs, built_python_docs
from nanochat_pl.data.sources.run_corpus import RunCorpus
from nanochat_pl.planning.text import TextFacts


def tokens_at_hand(
    settings: DataSettings,
    cache_dir: Path,
    vocab_size: int = 2**15,
    corpus: RunCorpus | None = None,
) -> int | None:
    """About how many tokens there are to train on, of a mixture those of all sources; None where that is not known.

    Args:
        corpus: the run's corpus of docstrings, which is made where it is missing; None: that of the packages installed
            now, where it has been made: nothing is written.

    Raises:
        UserError: data.path names no file, or one that cannot be read.
    """
    if settings.name == "mixture":
        known = tokens_by_source(settings, cache_dir, vocab_size, corpus).values()
        return None if None in known else sum(filter(None, known))
    return _in_tokens(_bytes_of("data", settings, cache_dir, corpus), vocab_size)


def tokens_by_source(
    settings: DataSettings,
    cache_dir: Path,
    vocab_size: int = 2**15,
    corpus: RunCorpus | None = None,
) -> dict[str, int | None]:
    """As :func:`tokens_at_hand`, of each source of a mixture."""
    return {
        name: _in_tokens(_bytes_of(f"data.sources.{name}", part, cache_dir, corpus), vocab_size)
        for name, part in settings.parts.items()
    }


def text_facts(settings: DataSettings, cache_dir: Path, vocab_size: int = 2**15) -> TextFacts:
    """What a plan can know of the text. Of several sources, those of a mixture, no files are counted.

    Args:
        settings: the config group ``data``; of data=auto what it comes to.
        cache_dir: ``paths.cache``; nothing is written there.

    Raises:
        UserError: as :func:`tokens_at_hand`.
    """
    num_shards, shard_bytes = None, None
    if settings.is_on_hub:
        files = _hub_files(settings, cache_dir)
        if training_files := _training_files(settings, files):
            num_shards, shard_bytes = training_files
        at_hand = _in_tokens(_bytes_of_hub(settings, files), vocab_size)
    else:
        at_hand = tokens_at_hand(settings, cache_dir, vocab_size)
    return TextFacts(
        name=f"data={settings.name}",
        bytes_per_token=bytes_per_token(vocab_size),
        shard_bytes=shard_bytes,
        num_shards=num_shards,
        tokens_at_hand=at_hand,
        crops=settings.packing_mode == "crop",
        streamed=settings.shuffle != "global",
        fetched=bool(settings.download),
    )


def tokens_of_docstrings(corpus: PythonDocs) -> int:
    """About how many tokens the training documents of the embedded corpus have."""
    return int(corpus.manifest["splits"]["train"]["bytes"] / BYTES_PER_TOKEN)


def _in_tokens(num_bytes: float | None, vocab_size: int) -> int | None:
    return None if num_bytes is None else int(num_bytes / bytes_per_token(vocab_size))


def _bytes_of(key: str, settings: SourceSettings, cache_dir: Path, run_corpus: RunCorpus | None) -> float | None:
    """About how many bytes of text a source has to train on."""
    if settings.name == "python_docs":
        corpus = built_python_docs(cache_dir) if run_corpus is None else run_corpus.reopened()
        return None if corpus is None else corpus.manifest["splits"]["train"]["bytes"]
    if settings.name == "local":
        chosen = choose_files(settings, key)
        held_out = settings.validation_fraction if chosen.by_hash else 0.0
        return sum(text_bytes(path, settings.text_column) for path in chosen.train.values()) * (1 - held_out)
    if settings.name == "custom":
        sizes = [shard.text_bytes for shard in open_custom(settings, key).shards("train")]
        return None if None in sizes else sum(filter(None, sizes))
    return _bytes_of_hub(settings, _hub_files(settings, cache_dir))


def _hub_files(settings: SourceSettings, cache_dir: Path) -> HubFiles | None:
    """The files of a data set of the hub; reading the list of many takes a second. None: it is not here."""
    try:
        return HubFiles(settings, cache_dir)
    except UserError:  # nothing of it has been downloaded yet
        return None


def _bytes_of_hub(settings: SourceSettings, files: HubFiles | None) -> float | None:
    if settings.download:  # what is not here comes while the training runs
        training_files = _training_files(settings, files)
        return None if training_files is None else training_files[0] * training_files[1]
    return None if files is None else files.tokens_here() * BYTES_PER_TOKEN


def _training_files(settings: SourceSettings, files: HubFiles | None) -> tuple[int, float] | None:
    """How many training files there are, here or not, and about how many bytes of text each has; None: not known."""
    if files is None:
        known = known_set(settings.repo)
        return known and (min(known.num_shards, settings.num_shards or known.num_shards), known.shard_bytes)
    number = len(files.train_files)
    return number, sum(files.shard_tokens()) * BYTES_PER_TOKEN / number
