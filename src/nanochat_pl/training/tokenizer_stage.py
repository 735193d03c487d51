"""The tokenizer stage: text in, a bundle with a tokenizer out. It has no model, so nothing of Lightning is needed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

from nanochat_pl.bundle import StageInfo, save_bundle
from nanochat_pl.bundle.bundle import load_tokenizer
from nanochat_pl.bundle.stage_info import library_versions
from nanochat_pl.common.console import print_table, say
from nanochat_pl.common.files import write_json
from nanochat_pl.common.run_folder import StageFolder
from nanochat_pl.common.settings import to_plain
from nanochat_pl.data.hub_errors import library_heard
from nanochat_pl.data.mixed_source import MixedSource
from nanochat_pl.data.run_corpus import RunCorpus
from nanochat_pl.data.sources import Source, too_little_text
from nanochat_pl.tokenizer import Tokenizer, train_tokenizer
from nanochat_pl.tokenizer.comparison import ComparisonRow, compare_tokenizers
from nanochat_pl.training.settings import TrainConfig

COMPARED_DOCUMENTS = 1_000


def train_tokenizer_stage(
    config: TrainConfig, folder: StageFolder, source: Source, corpus: RunCorpus | None = None
) -> None:
    """Train a tokenizer on the training documents, compare it with known ones, write its bundle.

    Args:
        config: the settings; ``tokenizer`` is used.
        folder: of this stage; created and locked by the caller.
        source: the documents.
        corpus: which corpus of docstrings the run has, for the record.

    Raises:
        UserError: there is no text, or too little for the vocabulary.
    """
    start = time.perf_counter()
    say(f"Training a tokenizer of {config.tokenizer.vocab_size:,} tokens on {source.name}.")
    for part in source.parts.values() if isinstance(source, MixedSource) else [source]:
        if not any(text for shard in part.shards("train") for text in shard.documents()):
            raise too_little_text(part, "train")
    if isinstance(source, MixedSource):
        documents = source.documents(config.tokenizer.max_chars_per_document)
        texts = {f"held-out {name}": _held_out(part) for name, part in source.parts.items()}
    else:
        documents = (text for shard in source.shards("train") for text in shard.documents())
        texts = {"held-out text": _held_out(source)}
    with library_heard():  # files of a hub may be fetched when they are read
        tokenizer = train_tokenizer(documents, config.tokenizer)
    comparison = compare_tokenizers(tokenizer, texts)
    _print_comparison(comparison)
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


def _held_out(source: Source) -> str:
    documents = (text for shard in source.shards("val") for text in shard.documents())
    return "\n\n".join(itertools.islice(documents, COMPARED_DOCUMENTS))


def tokenizer_for(config: TrainConfig, folder: StageFolder, source: Source) -> Tokenizer:
    """The tokenizer of a run; trained first where it is missing, and said."""
    stage = folder.parent("tokenizer")
    if stage.status == "finished":
        return load_tokenizer(stage.bundle)
    stage.create()
    with stage.locked():
        if stage.status != "finished":  # another process may have made it while this one waited
            say(f"The run {stage.run} has no tokenizer yet: training one first.")
            with stage.discarded_on_error():
                train_tokenizer_stage(config, stage, source)
    return load_tokenizer(stage.bundle)


def _print_comparison(rows: Sequence[ComparisonRow]) -> None:
    figures = [
        (row.name, f"{row.vocab_size:,}", *(f"{value:.2f}" for value in row.bytes_per_token.values()))
        for row in rows
        if not row.skipped
    ]
    texts = list(rows[0].bytes_per_token)
    names = ["bytes per token"] if len(texts) == 1 else [f"bytes per token, {text}" for text in texts]
    print_table(("tokenizer", "tokens", *names), figures)
    for row in rows:
        if row.skipped:
            say(f"{row.name}: {row.skipped}")
