"""The rl stage: reinforcement learning."""

from __future__ import annotations

from nanochat_pl.training.stages.registry import Stage, StageContext, StageData, stage


@stage("rl")
class RL(Stage):
    """Learning from rewards of its own answers to the tasks of mixture."""

    parents = ("base", "mid", "sft")
    trains_on_conversations = True
    trains_on_answers = True
    config_file = "rl"

    def prepare(self, context: StageContext) -> StageData:
        from nanochat_pl.training.rl.prepare import prepare_rl

        return prepare_rl(context)
