"""Copies of the golden checkpoints that a test may change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# What to read, and the folder in it with the checkpoint's files.
PLACES = {
    "nanochat_base": "base_checkpoints/d4",
    "nanochat_trained": "base_checkpoints/d4",
    "era_feb2026": ".",
    "era_oct2025": ".",
}


def copy(golden: Path, name: str, to: Path) -> Path:
    """A writable copy of a golden checkpoint; gives the folder to import."""
    for path in sorted((golden / name).rglob("*")):
        if path.is_file():
            target = to / name / path.relative_to(golden / name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return to / name


def only(source: Path, pattern: str) -> Path:
    """The one file of a copy that fits."""
    (found,) = source.rglob(pattern)
    return found


def edit_state(source: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the state dict of a copy in place."""
    path = only(source, "model_*.pt")
    state = torch.load(path, weights_only=True)
    change(state)
    path.unlink()
    torch.save(state, path)


def edit_meta(source: Path, **changes: Any) -> None:
    """Change keys of model_config in the meta file of a copy; None takes one out."""
    path = only(source, "meta_*.json")
    meta = json.loads(path.read_text(encoding="utf-8"))
    config = {**meta["model_config"], **changes}
    meta["model_config"] = {key: value for key, value in config.items() if value is not None}
    path.write_text(json.dumps(meta), encoding="utf-8")
