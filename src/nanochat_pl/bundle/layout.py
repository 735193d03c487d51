"""The files of a bundle, and how one of them is found."""

from __future__ import annotations

from pathlib import Path

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.text_files import kind_of_file

MODEL, CONFIG, TOKENIZER, STAGE, OPTIMIZER = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "stage.json",
    "optimizer.safetensors",
)


def member(folder: Path, name: str) -> Path:
    """A file of the bundle, which must be there and lie inside the folder (no link that climbs out of it)."""
    path = folder / name
    kind = kind_of_file(path)
    if kind is not None or not path.exists():
        raise UserError(f"{path}: {f'is {kind}' if kind else 'there is no such file'}.", fix=_how_to_mend(folder))
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path}: is a link that leads out of the bundle.", fix="Replace it by the file itself.")
    return path


def _how_to_mend(folder: Path) -> str:
    """What to do about a bundle that lacks a file: that of a finished stage had it once."""
    stage = folder.parent
    if (stage / "finished.json").is_file():
        return (
            f"The stage was finished with it: put it back, or remove {stage} and train the stage again. What later"
            " stages have is in their own bundles."
        )
    return "Give the folder of a bundle, e.g. runs/NAME/sft/bundle."
