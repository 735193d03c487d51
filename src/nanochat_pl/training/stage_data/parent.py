"""The model that a stage starts from: that of its finished parent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanochat_pl.bundle.bundle import hash_of_weights, load_config, load_moments, load_tokenizer, load_weights
from nanochat_pl.bundle.stage_info import StageInfo, load_stage_info
from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.run_dir import StageFolder
from nanochat_pl.model.config import GPTConfig, with_documents_of
from nanochat_pl.planning import Inherited, Plan, make_finetune_plan
from nanochat_pl.planning.estimates import add_step_memory
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.training.stage_data.base_plan import target_of
from nanochat_pl.training.stage_data.inherit import parent_folder
from nanochat_pl.training.stage_data.memory_check import require_room_for
from nanochat_pl.training.stages.registry import StageContext


@dataclass(frozen=True)
class ParentModel:
    """A finished stage, as another one starts from it.

    Attributes:
        folder, info: of that stage.
        model: its architecture.
        tokenizer: what made its ids.
        inherited: what the plan of the next stage takes from its plan.
        sha256: of its weights.
    """

    folder: StageFolder
    info: StageInfo
    model: GPTConfig
    tokenizer: Tokenizer
    inherited: Inherited
    sha256: str

    def plan(self, context: StageContext, num_rows: int) -> Plan:
        """The plan of a stage that goes on from it.

        Args:
            num_rows: of all ``stage.num_epochs``.
        """
        config, options = context.config, target_of(context.machine).row_options(context.config)
        plan = make_finetune_plan(
            self.model,
            config,
            config.optim,
            num_rows=num_rows,
            num_epochs=config.stage.num_epochs,
            parent=self.inherited.hyperparameters,
            parent_batch_tokens=self.inherited.total_batch_tokens,
            parent_name=self.folder.stage,
            options=options,
        )
        add_step_memory(plan, self.model, options)
        inherited = [
            f"{name} = {derived.value:g}"
            for name, derived in plan.values.items()
            if derived.overridden_by and derived.overridden_by.startswith("inherited")
        ]
        if inherited:
            rank_zero_print(f"Inherited from {self.folder.stage}: {', '.join(inherited)}.")
        return plan

    def start(self, context: StageContext) -> dict[str, Any]:
        """What is trained on from there: the fields of :class:`StageData` of these names."""
        parent = {"stage": self.folder.stage, "step": self.info.step, "sha256": self.sha256}
        return {
            "model": self.model,
            "tokenizer": self.tokenizer,
            "weights": load_weights(self.folder.bundle),
            "moments": load_moments(self.folder.bundle) if context.config.stage.warm_start else None,
            "parents": (*self.info.parents, parent),
        }


def load_parent(context: StageContext) -> ParentModel:
    """The parent of a stage that starts from a model; says which it is.

    Raises:
        UserError: it is not finished, its bundle is damaged, or its model does not fit into memory.
    """
    folder = parent_folder(context.config, context.folder)
    assert folder is not None, "the settings of a stage that is fine-tuned name its parent"
    bundle, info = folder.bundle, load_stage_info(folder.bundle)
    model = with_documents_of(context.config.model, load_config(bundle))
    sha256 = hash_of_weights(bundle)  # before any text is prepared for weights that are not there
    require_room_for(context, model)
    rank_zero_print(f"{context.config.stage.name} starts from {bundle} (trained for {info.step:,} steps).")
    inherited = Inherited.from_plain(info.plan, f"{bundle}/stage.json: plan")
    return ParentModel(folder, info, model, load_tokenizer(bundle), inherited, sha256)
