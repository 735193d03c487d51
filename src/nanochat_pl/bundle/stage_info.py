"""`stage.json`: where a bundle comes from."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import nanochat_pl
from nanochat_pl.bundle.layout import STAGE, member
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_object, sha256_of_file
from nanochat_pl.common.registry import is_name
from nanochat_pl.common.schema import build, setting

FORMAT_VERSION = 1
_CHAT_STAGES = ("mid", "sft", "rl")


@dataclass(frozen=True)
class StageInfo:
    """The origin of a bundle. Plain data: nothing in it is ever run, imported or followed as a path."""

    stage: str = setting(doc="tokenizer, base, sft …", max_length=100)
    step: int = setting(0, "Optimizer steps that this stage made.", at_least=0)
    format_version: int = setting(FORMAT_VERSION, "Layout of the bundle.", at_least=1, at_most=FORMAT_VERSION)
    plan: dict[str, Any] = setting(factory=dict, doc="The derived values with their reasons.")
    settings: dict[str, Any] = setting(factory=dict, doc="The resolved configuration of the stage.")
    metrics: dict[str, Any] = setting(factory=dict, doc="Final metrics, such as val/bpb.")
    parents: list[dict[str, Any]] = setting(factory=list, doc="Earlier stages: stage, step, SHA-256 of the weights.")
    versions: dict[str, str] = setting(factory=dict, doc="Versions of Python and of the libraries.")
    data: dict[str, Any] = setting(factory=dict, doc="What it was trained on: names, hashes, sizes.")
    changes: list[dict[str, Any]] = setting(factory=list, doc="What was otherwise each time that the stage went on.")
    origin: dict[str, Any] = setting(factory=dict, doc="What an import carries along, to write the same files again.")

    def __post_init__(self) -> None:
        if not is_name(self.stage):  # names of folders are made of it
            raise UserError(f"stage={self.stage!r}: is no name of a stage: small letters, digits and _.")

    @property
    def has_seen_conversations(self) -> bool:
        """Whether its model was trained on conversations. Of a stage that anybody adds, its data says it: text has a
        source."""
        trained_on_text = self.stage == "base" or "source" in self.data
        return not trained_on_text or any(parent.get("stage") in _CHAT_STAGES for parent in self.parents)


def load_stage_info(folder: Path) -> StageInfo:
    """The origin of a bundle."""
    return build(StageInfo, read_object(member(folder, STAGE)), str(folder / STAGE))


def library_versions() -> dict[str, str]:
    """Versions that metrics depend on: Python and the main libraries."""
    names = ("nanochat-pl", "torch", "lightning", "tiktoken", "tokenizers", "pyarrow", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def source_hash() -> str:
    """Of the SHA-256 over all source files of this package the first 16 digits."""
    package, digest = Path(nanochat_pl.__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()} {sha256_of_file(path)}\n".encode())
    return digest.hexdigest()[:16]
