"""What a run's folder says about its beginning: the resolved settings, the command, versions, machine, git state."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import nanochat_pl
from nanochat_pl.cli.compose import Composed
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import write_json, write_text
from nanochat_pl.common.run_folder import StageFolder

LIBRARIES = ("nanochat-pl", "torch", "lightning", "tokenizers", "tiktoken", "numpy", "pyarrow")


def write_records(folder: StageFolder, composed: Composed[Any]) -> None:
    """Write config.yaml, overrides.txt and about.json."""
    config = yaml.safe_dump(composed.plain(), sort_keys=False, allow_unicode=True)
    overrides = [f"experiment={composed.experiment}"] if composed.experiment else []
    write_text(folder.path / "config.yaml", config)
    write_text(folder.path / "overrides.txt", "".join(f"{text}\n" for text in [*overrides, *composed.overrides]))
    write_json(folder.path / "about.json", about())


def read_settings(folder: StageFolder) -> dict[str, Any] | None:
    """The settings that a run was begun with; None where it was killed before it wrote them."""
    path = folder.path / "config.yaml"
    if not path.is_file():
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no settings.", "Delete the folder to begin again.")
    return content


def about() -> dict[str, Any]:
    """Versions, machine and git state, as plain data."""
    return {
        "git": _git_state(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "device": _device_name(),
    }


def _device_name() -> str:
    import torch

    if not torch.cuda.is_available():
        return platform.processor() or platform.machine()
    return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"


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
