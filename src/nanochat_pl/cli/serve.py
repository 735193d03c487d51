"""Serves models: a page to talk on at /, and an API under /v1 that clients of OpenAI's speak.

nanochat-pl serve run=demo
nanochat-pl serve 'runs=[demo,other]' port=8080
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_pl.common.device_settings import Accelerator
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.imports import loading_libraries
from nanochat_pl.common.paths import PathsSettings, cache_folder, locate_bundle
from nanochat_pl.common.schema import UserPath, setting
from nanochat_pl.config.compose import compose
from nanochat_pl.serving.settings import KEY_VARIABLE, ServeSettings


@dataclass(frozen=True)
class ServeConfig(ServeSettings):
    """The root of configs/serve.yaml."""

    run: str | None = setting(None, "Name of the run; null: the only one there is.")
    runs: list[str] = setting(
        factory=list, doc="Several runs side by side, as NAME or NAME/STAGE; the page compares them.", max_length=16
    )
    stage: str | None = setting(None, "Stage of the run; null: the newest that is finished.")
    bundle: UserPath | None = setting(None, "Folder of a bundle, instead of a run.")
    name: str | None = setting(None, "Name of the one model in the API; null: that of its run, or of its folder.")
    accelerator: Accelerator = setting("auto", "Device to run on; auto: the best there is, with a worker on each GPU.")
    num_threads: int | None = setting(
        None, "CPU threads of a worker; null: as torch decides.", at_least=1, at_most=1024
    )
    paths: PathsSettings = setting(factory=PathsSettings)


Config = ServeConfig


def run(arguments: Sequence[str]) -> int:
    """The command."""
    config = compose("serve", ServeConfig, arguments).config
    keys = _keys(config)
    if not (config.is_local or keys or config.allow_anonymous):
        raise UserError(
            f"host={config.host}: others can reach this address, and no API key is asked for.",
            fix=f"Set {KEY_VARIABLE} or api_key_file=FILE; or allow_anonymous=true, if everybody may use it.",
        )
    models = _models(config)
    try:
        with loading_libraries():
            from nanochat_pl.common.device import choose_device, num_devices, require_kernels
            from nanochat_pl.serving.run import serve
    except ModuleNotFoundError as error:
        raise UserError(
            f"serve: needs the package {error.name}, which is not installed.", fix="pip install 'nanochat-pl[serve]'"
        ) from error
    device = choose_device(config.accelerator, "accelerator")
    require_kernels(device)
    shared = {
        "num_threads": config.num_threads,
        "num_slots": config.num_slots,
        "max_context": config.max_context,
        "prefill_chunk": config.prefill_chunk,
        "stream_interval": config.stream_interval,
        "compile": config.compile,
        "cache": str(cache_folder(config.paths)),
    }
    devices = [str(device)]
    if device.type == "cuda":
        devices = [f"cuda:{number}" for number in range(num_devices("auto", device, "devices"))]
    specs: list[tuple[str, dict[str, Any]]] = [
        (name, {**shared, "bundle": str(folder), "device": each}) for name, folder in models.items() for each in devices
    ]
    return serve(specs, config, keys)


def _models(config: ServeConfig) -> dict[str, Path]:
    """The bundles to serve, by the names that they have in the API."""
    runs = Path(config.paths.runs)
    if not config.runs:
        folder = locate_bundle(config.bundle, config.run, config.stage, runs)
        named = folder.parent.parent.name if config.bundle is None else folder.resolve().name
        return {config.name or named: folder}
    if config.run or config.stage or config.bundle or config.name:
        raise UserError("runs: names all models; leave out run, stage, bundle and name.")
    if len({*config.runs}) < len(config.runs):
        raise UserError(f"runs={config.runs}: one is named twice.")
    found = {}
    for name in config.runs:
        run_name, _, stage = name.partition("/")
        found[name] = locate_bundle(None, run_name, stage or None, runs)
    return found


def _keys(config: ServeConfig) -> list[str]:
    """The API keys. They never stand on the command line, where everybody on the machine could read them."""
    found = [(KEY_VARIABLE, os.environ.get(KEY_VARIABLE, "").strip())]  # each with the place where it stands
    if config.api_key_file is not None:
        path = Path(config.api_key_file)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"api_key_file={path}: cannot be read: {error}.") from error
        found += [(f"api_key_file={path}, line {number}", line.strip()) for number, line in enumerate(lines, 1)]
        if not any(key for _, key in found):
            raise UserError(f"api_key_file={path}: has no key in it.")
    if short := [place for place, key in found if 0 < len(key) < 8]:
        raise UserError(
            [f"{place}: the API key has fewer than 8 characters." for place in short],
            fix="Use a longer one: openssl rand -hex 24",
        )
    return [key for _, key in found if key]
