"""Talks to a trained model in the terminal, or answers one prompt.

nanochat-pl chat run=demo
nanochat-pl chat run=demo prompt="What's 17 * 23?"
nanochat-pl chat url=http://127.0.0.1:8000        # with a model that nanochat-pl serve serves
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_pl.common.device_settings import Accelerator
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.imports import loading_libraries
from nanochat_pl.common.paths import PathsSettings, locate_bundle
from nanochat_pl.common.schema import UserPath, setting
from nanochat_pl.config.compose import compose
from nanochat_pl.engine.settings import ChatSettings
from nanochat_pl.engine.terminal_chat import run_chat, talk
from nanochat_pl.serving.settings import KEY_VARIABLE


@dataclass(frozen=True)
class ChatConfig(ChatSettings):
    """The root of configs/chat.yaml."""

    run: str | None = setting(None, "Name of the run; null: the only one there is.")
    stage: str | None = setting(None, "Its stage; null: the newest that is finished.")
    bundle: UserPath | None = setting(None, "Folder of a bundle, instead of a run.")
    url: str | None = setting(None, "Address of a server (nanochat-pl serve), whose model answers.")
    model: str | None = setting(None, "Name of a model of that server; null: its first.")
    accelerator: Accelerator = setting("auto", "Device to run on; auto: the best there is.")
    paths: PathsSettings = setting(factory=PathsSettings)


Config = ChatConfig


def run(arguments: Sequence[str]) -> int:
    """The command."""
    config = compose("chat", ChatConfig, arguments).config
    if config.url is not None:
        _refuse_with_url(config)
        from nanochat_pl.serving.client import RemoteSession

        talk(RemoteSession(config.url, config.model, config.system or "", os.environ.get(KEY_VARIABLE)), config)
        return 0
    if config.model is not None:
        raise UserError(f"model={config.model}: is for a server; give url, or run and stage.")
    folder = locate_bundle(config.bundle, config.run, config.stage, Path(config.paths.runs))
    with loading_libraries():
        from nanochat_pl.bundle.bundle import load_bundle
        from nanochat_pl.common.device import choose_device, require_kernels
    device = choose_device(config.accelerator, "accelerator")
    require_kernels(device)
    run_chat(load_bundle(folder, device=device), config)
    return 0


def _refuse_with_url(config: ChatConfig) -> None:
    """Raise :class:`UserError` for keys that the server decides."""
    names = ("run", "stage", "bundle", "quantize", "compile", "max_context")
    if given := [name for name in names if getattr(config, name) not in (None, False)]:
        raise UserError(f"{', '.join(given)}: the server at url={config.url} decides; leave it out.")
