"""Where things lie in the folders of nanochat, and which checkpoint of a folder is meant.

A base folder has ``base_checkpoints/<tag>/`` with ``model_000007.pt``, ``meta_000007.json`` and, for each process,
``optim_000007_rank0.pt``; the same for the later stages; and ``tokenizer/``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_json

Stage = Literal["base", "mid", "sft", "rl"]
# Generations of the architecture, named as the files of configs/model.
Era = Literal["nanochat", "nanochat_2026_02", "nanochat_2025_10"]
STAGE_FOLDERS: dict[Stage, str] = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
TOKENIZER_FOLDER, TOKENIZER_FILE, TOKEN_BYTES_FILE = "tokenizer", "tokenizer.pkl", "token_bytes.pt"
# What meta files have of models that were trained to chat alone: metrics, and settings of that training.
_OF_CHAT = {"val_loss", "chatcore", "chatcore_metric", "mmlu_epochs", "gsm8k_epochs"}
_MODEL = re.compile(r"model_(\d{6,12})\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: a folder and a step.

    Attributes:
        stage: by the folder above; None for a folder with checkpoints alone.
    """

    folder: Path
    step: int
    stage: Stage | None = None

    @property
    def model(self) -> Path:
        return self.folder / f"model_{self.step:06d}.pt"

    @property
    def meta(self) -> Path:
        return self.folder / f"meta_{self.step:06d}.json"

    @property
    def optimizers(self) -> list[Path]:
        """The optimizer's file of each process that is there, sorted."""
        named = re.compile(rf"optim_{self.step:06d}(_.*)?\.pt")
        return sorted(path for path in self.folder.iterdir() if named.fullmatch(path.name))

    def optimizer(self, rank: int | None = 0) -> Path:
        """The file of a process, or the one that names none."""
        ending = "" if rank is None else f"_rank{rank}"
        return self.folder / f"optim_{self.step:06d}{ending}.pt"

    def keys(self) -> str:
        """How a person names it."""
        stage = f"stage={self.stage} tag={self.folder.name} " if self.stage else f"tag={self.folder.name} "
        return f"{stage}step={self.step}"


def list_checkpoints(source: Path) -> list[Checkpoint]:
    """All checkpoints of a base folder, of one of its stages, or of a folder with checkpoints alone; sorted."""
    stages = {folder: stage for stage, folder in STAGE_FOLDERS.items()}
    found = [
        checkpoint
        for name, stage in stages.items()
        for tag in _folders(source / name)
        for checkpoint in _in_folder(tag, stage)
    ]
    if not found:
        found = [checkpoint for tag in _folders(source) for checkpoint in _in_folder(tag, stages.get(source.name))]
    return found + _in_folder(source, stages.get(source.absolute().parent.name))


def choose_checkpoint(source: Path, stage: Stage | None, tag: str | None, step: int | None) -> Checkpoint:
    """The one checkpoint of a folder that fits what is given.

    Raises:
        UserError: there is none, or there are several; they are listed with the keys that choose.
    """
    found = list_checkpoints(source)
    if not found:
        raise UserError(
            f"source={source}: has no checkpoint of nanochat in it (model_000000.pt with its meta_000000.json).",
            fix=f"Give a base folder (with {', '.join(STAGE_FOLDERS.values())}), or a folder with a checkpoint alone.",
        )
    fitting = [
        each
        for each in found
        if (stage is None or each.stage in (stage, None))
        and (tag is None or each.folder.name == tag)
        and (step is None or each.step == step)
    ]
    if len(fitting) == 1:
        return fitting[0]
    listed = "; ".join(each.keys() for each in (fitting or found)[:10])
    more = f" … ({len(fitting or found)} in all)" if len(fitting or found) > 10 else ""
    if fitting:
        raise UserError(f"source={source}: has several checkpoints: {listed}{more}.", fix="Say which, with these keys.")
    raise UserError(f"source={source}: has no such checkpoint; there are: {listed}{more}.")


def stage_of(checkpoint: Checkpoint, asked: Stage | None) -> Stage:
    """The stage that a checkpoint is of: its folder says it, else whoever asked for it, else what was measured of it.

    Raises:
        UserError: its folder is a plain one, and nothing in its meta file tells a chat model from a base model.
    """
    if stage := checkpoint.stage or asked:
        return stage
    meta = read_json(checkpoint.meta, infinities=True) if checkpoint.meta.exists() else {}
    keys = set(meta) if isinstance(meta, dict) else set()
    trained = meta.get("user_config") if isinstance(meta, dict) else None
    keys |= set(trained) if isinstance(trained, dict) else set()
    if keys & _OF_CHAT or any(key.endswith("_acc") for key in keys):
        return "sft"
    if "val_bpb" in keys:
        return "base"
    raise UserError(
        f"source={checkpoint.folder}: nothing says whether {checkpoint.model.name} is a base model or a chat model.",
        "Say which: stage=base, stage=mid, stage=sft or stage=rl.",
    )


def tokenizer_folders(source: Path, checkpoint: Checkpoint) -> Iterable[Path]:
    """Where the tokenizer of a checkpoint may lie: beside it, or at the top of the base folder that it lies in."""
    yield source
    yield source / TOKENIZER_FOLDER
    if checkpoint.stage is not None:
        yield checkpoint.folder.absolute().parents[1] / TOKENIZER_FOLDER


def _folders(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir()) if path.is_dir() else []


def _in_folder(folder: Path, stage: Stage | None) -> list[Checkpoint]:
    matches = [_MODEL.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    steps = sorted(int(match[1]) for match in matches if match)
    return [each for each in (Checkpoint(folder, step, stage) for step in steps) if each.model.is_file()]
