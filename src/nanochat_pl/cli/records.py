"""What a run's folder says about its beginning: the resolved settings, the command, versions, machine, git state."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

import nanochat_pl
from nanochat_pl.bundle.bundle import load_stage_info
from nanochat_pl.bundle.stage_info import library_versions
from nanochat_pl.cli.compose import Composed
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import write_json, write_text
from nanochat_pl.common.hardware import choose_device, device_name
from nanochat_pl.common.run_folder import StageFolder
from nanochat_pl.common.settings import to_plain
from nanochat_pl.data.opening import read_chosen
from nanochat_pl.training.settings import TrainConfig

# Keys, or groups of keys, that have no say in what is learnt: they may differ when a stage goes on.
NO_SAY = {"trainer", "evaluation", "paths", "logger", "callbacks", "device_batch_size", "run", "resume", "check_only"}
_HAVE_A_SAY = {field.name for field in dataclasses.fields(TrainConfig)} - NO_SAY
# What each stage depends on. Model and tokenizer of a later stage are its parent's.
MATTERS = {
    "tokenizer": {"tokenizer", "data"},
    "base": _HAVE_A_SAY - {"mixture"},
    "sft": _HAVE_A_SAY - {"tokenizer", "model", "data"},
}
# Of those groups what changes when the work is done and never its result.
WITHOUT_A_SAY = {"data.download", "data.max_bad_fraction"}


def write_records(folder: StageFolder, composed: Composed[Any], goes_on: bool = False) -> None:
    """Write config.yaml and overrides.txt; and about.json, unless the stage goes on: that is of its beginning."""
    config = yaml.safe_dump(composed.plain(), sort_keys=False, allow_unicode=True)
    overrides = [f"experiment={composed.experiment}"] if composed.experiment else []
    write_text(folder.path / "config.yaml", config)
    write_text(folder.path / "overrides.txt", "".join(f"{text}\n" for text in [*overrides, *composed.overrides]))
    if not goes_on:
        write_json(folder.path / "about.json", about())


def settings_that_matter(values: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Of all settings as plain data those that a stage depends on, by their dotted keys."""
    keys = _flat(values)
    # Keys of a source of a mixture, data.sources.NAME.KEY, are keys of data.
    own = {key: re.sub(r"^data\.sources\.[^.]+\.", "data.", key) for key in keys}
    return {key: keys[key] for key in keys if key.split(".")[0] in MATTERS[stage] and own[key] not in WITHOUT_A_SAY}


def require_same_settings(folder: StageFolder, composed: Composed[Any]) -> None:
    """Refuse to go on with a stage, or to call it finished, under other settings than it was begun with.

    Raises:
        UserError: names each key with both values.
    """
    begun = _read_settings(folder)
    if not begun:
        return
    then, now = (settings_that_matter(values, folder.stage) for values in (begun, composed.plain()))
    then |= _of_younger_keys(then, folder.stage)
    then, now = (_with_counted_files(values, folder) for values in (then, now))
    differences = [
        f"{key}={as_typed(now.get(key))}: {folder.path} was begun with {key}={as_typed(then.get(key))}."
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if differences:
        raise UserError(differences, "Leave these keys as they were, or begin a new run with run=NAME or resume=never.")


def _with_counted_files(values: dict[str, Any], folder: StageFolder) -> dict[str, Any]:
    """The settings, where null files of a hub are as many as the stage was begun with: it goes on with these."""
    counted = {f"{key}.num_shards": len(chosen.train) for key, chosen in read_chosen(folder.chosen_files).items()}
    return values | {key: number for key, number in counted.items() if key in values and values[key] is None}


def _of_younger_keys(then: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The defaults of keys that did not exist yet when a stage was begun: what they name was done so all the time."""
    defaults = settings_that_matter(to_plain(TrainConfig()), stage)

    def known(key: str) -> bool:  # or part of a group that was null, or a group that was not empty
        parts = key.split(".")
        within = any(".".join(parts[:count]) in then for count in range(1, len(parts) + 1))
        return within or any(other.startswith(f"{key}.") for other in then)

    return {key: value for key, value in defaults.items() if not known(key)}


def _read_settings(folder: StageFolder) -> dict[str, Any]:
    """What config.yaml says; else the bundle: base makes a tokenizer on its way, and that has no records of its own."""
    path = folder.path / "config.yaml"
    if not path.is_file():
        return load_stage_info(folder.bundle).settings if folder.bundle.is_dir() else {}
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


def as_typed(value: Any) -> str:
    """A value as YAML and the command line write it."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).split("\n")[0]


def about() -> dict[str, Any]:
    """Time, versions, machine and git state, as plain data."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
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
