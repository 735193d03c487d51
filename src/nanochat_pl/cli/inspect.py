"""Shows an answer that a model learnt from, and writes it again: the same tokens, with the same probabilities.

nanochat-pl inspect rollout=1:0 run=NAME
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_pl.common.device_settings import Accelerator
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.imports import loading_libraries
from nanochat_pl.common.paths import PathsSettings
from nanochat_pl.common.schema import setting
from nanochat_pl.config.compose import compose


@dataclass(frozen=True)
class InspectConfig:
    """The root of configs/inspect.yaml."""

    rollout: str | None = setting(None, "Which answer, STEP:I: number I, from 0, of those that a step was trained on.")
    run: str | None = setting(None, "Name of the run; null: the only one there is.")
    stage: str = setting("rl", "Its stage.")
    tokens: bool = setting(False, "Show each token with its log-probability.")
    accelerator: Accelerator = setting("auto", "Device to write it again on; auto: the best there is.")
    paths: PathsSettings = setting(factory=PathsSettings)


Config = InspectConfig


def run(arguments: Sequence[str]) -> int:
    """The command: 0 also where the answer cannot be written again, 1 where other tokens come out."""
    config = compose("inspect", InspectConfig, arguments).config
    match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", config.rollout or "")
    if match is None:
        raise UserError(
            f"rollout={config.rollout or ''}: must be STEP:I, the number of a step and that of an answer in it.",
            "The first one: rollout=1:0.",
        )
    with loading_libraries():
        from nanochat_pl.cli._inspect import inspect
    return inspect(config, int(match[1]), int(match[2]))
