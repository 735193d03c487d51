"""The base stage: pretraining on text."""

from __future__ import annotations

from nanochat_pl.training.stages.registry import Stage, StageContext, StageData, stage


@stage("base")
class Base(Stage):
    """Pretraining on the text of data, from random weights."""

    # It need not have one: a tokenizer that is not there is made on the way.
    parents = ("tokenizer",)
    inherits = ("tokenizer",)
    from_scratch = True
    validates_at_start = True
    next_step = ("make it a chat model", "train stage=sft")

    def prepare(self, context: StageContext) -> StageData:
        from nanochat_pl.training.stage_data.text import prepare_pretraining

        return prepare_pretraining(context)
