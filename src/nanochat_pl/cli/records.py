"""What a run's folder says about its beginning: the resolved settings, the command, versions, machine, git state."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import nanochat_pl
from nanochat_pl.bundle.stage_info import library_versions
from nanochat_pl.cli.compose import Composed
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import write_json, write_text
from nanochat_pl.common.hardware import choose_device, device_name
from nanochat_pl.common.run_folder import StageFolder

# Settings that have no say in what is learnt: they may differ when a stage goes on.
FREE_TO_CHANGE = (
    "trainer",
    "evaluation",
    "paths",
    "logger",
    "callbacks",
    "device_batch_size",
    "run",
    "resume",
    "check_only",
)


def write_records(folder: StageFolder, composed: Composed[Any]) -> None:
    """Write config.yaml, overrides.txt and about.json."""
    config = yaml.safe_dump(composed.plain(), sort_keys=False, allow_unicode=True)
    overrides = [f"experiment={composed.experiment}"] if composed.experiment else []
    write_text(folder.path / "config.yaml", config)
    write_text(folder.path / "overrides.txt", "".join(f"{text}\n" for text in [*overrides, *composed.overrides]))
    write_json(folder.path / "about.json", about())


def require_same_settings(folder: StageFolder, composed: Composed[Any]) -> None:
    """Refuse to go on with a stage, or to call it finished, under other settings than it was begun with.

    Raises:
        UserError: names each key with both values.
    """
    then, now = _flat(_read_settings(folder)), _flat(composed.plain())
    differences = [
        f"{key}={_show(now.get(key))}: {folder.path} was begun with {key}={_show(then.get(key))}."
        for key in sorted(then.keys() | now.keys())
        if then and _matters(key, folder.stage) and then.get(key) != now.get(key)
    ]
    if differences:
        raise UserError(differences, "Leave these keys as they were, or begin a new run with run=NAME or resume=never.")


def _matters(key: str, stage: str) -> bool:
    group = key.split(".")[0]
    if stage == "tokenizer":
        return group in ("tokenizer", "data")
    return group not in FREE_TO_CHANGE


def _read_settings(folder: StageFolder) -> dict[str, Any]:
    """What config.yaml says; empty for a stage that another one made on its way, as base does with the tokenizer."""
    path = folder.path / "config.yaml"
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no settings.", "Delete the stage's folder to begin again.")
    return content


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _show(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).split("\n")[0]


def about() -> dict[str, Any]:
    """Versions, machine and git state, as plain data."""
    return {
        "git": _git_state(),
        "versions": library_versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "device": device_name(choose_device()),
    }


def _git_state() -> str:
    """Commit of the checkout that runs, with a word where it has changes; empty for an installed package."""
    checkout = Path(nanochat_pl.__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return ""
    commit = _git(checkout, "rev-parse", "HEAD")
    return f"{commit} with changes" if commit and _git(checkout, "status", "--porcelain", "-uno") else commit


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
