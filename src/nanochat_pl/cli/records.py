"""What a run's folder says about its beginning: the resolved settings, the command, versions, machine, git state."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import yaml

import nanochat_pl
from nanochat_pl.bundle.stage_info import library_versions
from nanochat_pl.cli.compose import Composed
from nanochat_pl.common.files import write_json, write_text
from nanochat_pl.common.hardware import choose_device, device_name
from nanochat_pl.common.run_folder import StageFolder


def write_records(folder: StageFolder, composed: Composed[Any]) -> None:
    """Write config.yaml, overrides.txt and about.json."""
    config = yaml.safe_dump(composed.plain(), sort_keys=False, allow_unicode=True)
    overrides = [f"experiment={composed.experiment}"] if composed.experiment else []
    write_text(folder.path / "config.yaml", config)
    write_text(folder.path / "overrides.txt", "".join(f"{text}\n" for text in [*overrides, *composed.overrides]))
    write_json(folder.path / "about.json", about())


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
