"""The sft stage: supervised fine-tuning."""

from __future__ import annotations

from nanochat_pl.training.stages.registry import Stage, StageContext, StageData, stage


@stage("sft")
class Sft(Stage):
    """Fine-tuning on conversations, of which the assistant's part is learnt."""

    parents: tuple[str, ...] = ("base", "mid")
    trains_on_conversations = True
    config_file = "sft"

    def prepare(self, context: StageContext) -> StageData:
        from nanochat_pl.training.stage_data.conversations import prepare_conversations

        return prepare_conversations(context)
