"""The tokenizer stage: text in, a bundle with a tokenizer out. It has no model, so nothing of Lightning is needed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import tokenizers

from nanochat_pl.bundle.bundle import load_tokenizer, save_bundle
from nanochat_pl.bundle.stage_info import StageInfo, library_versions
from nanochat_pl.common.console import SECONDS_BETWEEN_LINES, console, rank_zero_print
from nanochat_pl.common.files import write_json
from nanochat_pl.common.launch_env import launch_env
from nanochat_pl.common.run_dir import StageFolder
from nanochat_pl.common.schema import to_plain
from nanochat_pl.data.cache.content_cache import building, fingerprint_of, read_cache, write_cache
from nanochat_pl.data.hub.errors import library_heard
from nanochat_pl.data.sources.base import Source, Split, too_little_text
from nanochat_pl.data.sources.mixture import MixedSource
from nanochat_pl.data.sources.run_corpus import RunCorpus
from nanochat_pl.tokenizer import SPLIT_PATTERN, Tokenizer, train_tokenizer
from nanochat_pl.tokenizer.bpe import SPECIAL_TOKENS
from nanochat_pl.tokenizer.comparison import compare_tokenizers, comparison_table, print_comparison, texts_of_kinds
from nanochat_pl.training.config import TrainConfig

COMPARED_DOCUMENTS = 1_000


def train_tokenizer_stage(
    config: TrainConfig, folder: StageFolder, source: Source, cache: Path, corpus: RunCorpus | None = None
) -> None:
    """Train a tokenizer on the training documents, compare it with known ones, write its bundle.

    Args:
        config: the settings; ``tokenizer`` is used.
        folder: of this stage; created and locked by the caller.
        source: the documents.
        cache: where a tokenizer of the same documents and settings may be, and is put.
        corpus: which corpus of docstrings the run has, for the record.

    Raises:
        UserError: there is no text, or too little for the vocabulary.
    """
    start = time.perf_counter()
    for part in source.parts.values() if isinstance(source, MixedSource) else [source]:
        if not any(text for shard in part.shards("train") for text in shard.documents()):
            raise too_little_text(part, "train")
    if isinstance(source, MixedSource):
        documents = source.documents(config.tokenizer.max_chars_per_document)
    else:
        documents = (text for shard in source.shards("train") for text in shard.documents())
    tokenizer = _trained(config, source, documents, cache)
    texts = texts_of_kinds() | texts_of_source(source)
    comparison = compare_tokenizers(tokenizer, texts)
    print_comparison(*comparison_table(comparison, texts), {row.name: row.skipped for row in comparison if row.skipped})
    info = StageInfo(
        stage="tokenizer",
        settings=to_plain(config),
        metrics={"comparison": [to_plain(row) for row in comparison]},
        versions=library_versions(),
        data={
            "source": source.name,
            "fingerprint": source.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            **(corpus.chosen() if corpus else {}),
        },
    )
    save_bundle(folder.bundle, info, tokenizer=tokenizer)
    seconds = time.perf_counter() - start
    write_json(folder.path / "finished.json", {"step": 0, "metrics": info.metrics, "seconds": seconds})


def _trained(config: TrainConfig, source: Source, documents: Iterable[str], cache: Path) -> Tokenizer:
    """The tokenizer of these documents and settings, which all runs share: the jobs of a sweep train it once."""
    key = {
        "format": 1,
        "documents": source.fingerprint,
        "settings": to_plain(config.tokenizer),
        "pattern": SPLIT_PATTERN,
        "special_tokens": list(SPECIAL_TOKENS),
        "tokenizers": tokenizers.__version__,
    }
    kept = cache / "tokenizers" / fingerprint_of(key)[:32]
    with building(kept):
        if read_cache(kept, key) is not None:
            rank_zero_print(
                f"A tokenizer of {config.tokenizer.vocab_size:,} tokens has been trained on this text before."
            )
            return Tokenizer.load(kept / "tokenizer.json")
        rank_zero_print(f"Training a tokenizer of {config.tokenizer.vocab_size:,} tokens on {source.name}.")
        show_bars = console(stderr=True).is_terminal and launch_env().rank == 0
        on_progress = None if show_bars else _lines_of_progress()
        with library_heard():  # files of a hub may be fetched when they are read
            tokenizer = train_tokenizer(documents, config.tokenizer, on_progress, show_bars)
        write_cache(kept, key, {"tokenizer.json": tokenizer.save}, {})
    return tokenizer


def _lines_of_progress() -> Callable[[int], None]:
    """What is called with the characters read and says them now and then. How many come, nobody knows before."""
    spoken = time.monotonic()

    def on_progress(num_chars: int) -> None:
        nonlocal spoken
        if time.monotonic() - spoken >= SECONDS_BETWEEN_LINES:
            spoken = time.monotonic()
            rank_zero_print(f"tokenizer: {num_chars:,} characters read; merging comes after them.")

    return on_progress


def texts_of_source(source: Source) -> dict[str, str]:
    """What tokenizers are compared on besides texts of a few kinds: the beginning of what is trained on and of what is
    held out, of a mixture for each source."""
    parts = source.parts if isinstance(source, MixedSource) else {"text": source}
    splits: dict[str, Split] = {"training": "train", "held-out": "val"}
    return {f"{word} {name}": _beginning(part, split) for word, split in splits.items() for name, part in parts.items()}


def _beginning(source: Source, split: Split) -> str:
    # Of a data set that is fetched when it is read, no more than the first file to train on.
    shards = source.shards(split)[:1] if split == "train" else source.shards(split)
    documents = (text for shard in shards for text in shard.documents())
    return "\n\n".join(itertools.islice(documents, COMPARED_DOCUMENTS))


def tokenizer_for(
    config: TrainConfig, folder: StageFolder, source: Source, cache: Path, corpus: RunCorpus | None = None
) -> Tokenizer:
    """The tokenizer of a run; trained first where it is missing, and said."""
    stage = folder.parent("tokenizer")
    if stage.status == "finished":
        return load_tokenizer(stage.bundle)
    stage.create()
    with stage.locked():
        if stage.status != "finished":  # another process may have made it while this one waited
            rank_zero_print(f"The run {stage.run} has no tokenizer yet: training one first.")
            with stage.undone_on_error():
                train_tokenizer_stage(config, stage, source, cache, corpus)
    return load_tokenizer(stage.bundle)
