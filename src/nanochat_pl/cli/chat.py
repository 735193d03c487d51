"""Talks to a trained model in the terminal, or answers one prompt.

nanochat-pl chat run=demo
nanochat-pl chat run=demo prompt="What's 17 * 23?"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_pl.bundle import load_bundle
from nanochat_pl.common.device import Accelerator, choose_device, require_kernels
from nanochat_pl.common.paths import PathsSettings, locate_bundle
from nanochat_pl.common.schema import UserPath, setting
from nanochat_pl.config.compose import compose
from nanochat_pl.engine.terminal_chat import ChatSettings, run_chat


@dataclass(frozen=True)
class ChatConfig(ChatSettings):
    """The root of configs/chat.yaml."""

    run: str | None = setting(None, "Name of the run; null: the only one there is.")
    stage: str | None = setting(None, "Its stage; null: the newest that is finished.")
    bundle: UserPath | None = setting(None, "Folder of a bundle, instead of a run.")
    accelerator: Accelerator = setting("auto", "Device to run on; auto: the best there is.")
    paths: PathsSettings = setting(factory=PathsSettings)


Config = ChatConfig


def run(arguments: Sequence[str]) -> int:
    """The command."""
    config = compose("chat", ChatConfig, arguments).config
    folder = locate_bundle(config.bundle, config.run, config.stage, Path(config.paths.runs))
    device = choose_device(config.accelerator, "accelerator")
    require_kernels(device)
    run_chat(load_bundle(folder, device=device), config)
    return 0
