"""Talks to a trained model in the terminal, or answers one prompt.

nanochat-pl chat run=demo
nanochat-pl chat run=demo prompt="What's 17 * 23?"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_pl.bundle import load_bundle
from nanochat_pl.cli.chat_session import ChatSettings, run_chat
from nanochat_pl.cli.compose import compose
from nanochat_pl.cli.locate import locate_bundle
from nanochat_pl.common.hardware import Accelerator, choose_device, require_kernels
from nanochat_pl.common.settings import setting
from nanochat_pl.training.settings import PathsSettings


@dataclass(frozen=True)
class ChatConfig(ChatSettings):
    """The root of configs/chat.yaml."""

    run: str | None = setting(None, "Name of the run; null: the only one there is.")
    stage: str | None = setting(None, "Its stage; null: the newest that is finished.")
    bundle: str | None = setting(None, "Folder of a bundle, instead of a run.")
    accelerator: Accelerator = setting("auto", "Device to run on; auto: the best there is.")
    paths: PathsSettings = setting(factory=PathsSettings)


Config = ChatConfig


def run(arguments: Sequence[str]) -> int:
    """The verb."""
    config = compose("chat", ChatConfig, arguments).config
    folder = locate_bundle(config.bundle, config.run, config.stage, Path(config.paths.runs))
    device = choose_device(config.accelerator, "accelerator")
    require_kernels(device)
    run_chat(load_bundle(folder, device=device), config)
    return 0
