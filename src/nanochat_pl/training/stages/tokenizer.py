"""The tokenizer stage: text in, a bundle with a tokenizer out."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_pl.training.stages.registry import Stage, stage

if TYPE_CHECKING:
    from nanochat_pl.common.run_dir import StageFolder
    from nanochat_pl.data.sources.run_corpus import RunCorpus
    from nanochat_pl.training.config import TrainConfig


@stage("tokenizer")
class TokenizerStage(Stage):
    """Trains the tokenizer on the text of data."""

    inherits = ()
    has_model = False
    next_step = ("train a model", "train stage=base")

    def depends_on(self, keys: Set[str]) -> Set[str]:
        return keys & {"tokenizer", "data"}

    def make_bundle(self, config: TrainConfig, folder: StageFolder, cache: Path, corpus: RunCorpus) -> None:
        from nanochat_pl.training.stage_data.source import open_for_tokenizer
        from nanochat_pl.training.stage_data.tokenizer import train_tokenizer_stage

        train_tokenizer_stage(config, folder, open_for_tokenizer(config, cache, corpus), cache, corpus)
