"""Stages that seem to be trained."""

from __future__ import annotations

from nanochat_pl.cli.run_record import write_records
from nanochat_pl.cli.train import compose_train, place_of, with_parent
from nanochat_pl.common.files import write_json
from nanochat_pl.common.run_dir import StageFolder


def pretend_finished(*overrides: str) -> StageFolder:
    """The folder of a stage as if the command had trained it."""
    composed = compose_train(overrides)
    folder = place_of(composed)
    composed = with_parent(composed, folder)
    folder.create()
    write_records(folder, composed)
    write_json(folder.bundle / "stage.json", {"stage": folder.stage, "settings": composed.plain()})
    write_json(folder.path / "finished.json", {"step": 1, "metrics": {}, "seconds": 1.0})
    return folder
