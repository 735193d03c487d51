"""Makes a bundle of a model from elsewhere: a checkpoint of nanochat, or a folder of transformers; with a certificate.

nanochat-pl import source=nanochat-folder to=my-bundle
nanochat-pl import source=nanochat-folder run=NAME     (a run that later stages start from)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_pl.bundle.layout import STAGE
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.imports import loading_libraries
from nanochat_pl.common.paths import PathsSettings
from nanochat_pl.common.schema import UserPath, setting
from nanochat_pl.config.compose import compose
from nanochat_pl.convert.nanochat.layout import Era, Stage
from nanochat_pl.convert.output_dir import require_free


@dataclass(frozen=True)
class ImportConfig:
    """The root of configs/import.yaml."""

    source: UserPath | None = setting(None, "Folder to read: of nanochat, or of transformers.")
    to: UserPath | None = setting(None, "Folder of the bundle to make; it must not be there, or be empty.")
    run: str | None = setting(None, "Instead of to: name of a new run that the bundle becomes a finished stage of.")
    stage: Stage | None = setting(
        None,
        "nanochat: which stage's checkpoint, where there are several. transformers: what the model is, where it does"
        " not say it.",
    )
    tag: str | None = setting(None, "nanochat: which model's (d12 …), where there are several.")
    step: int | None = setting(None, "nanochat: which step's, where there are several.", at_least=0)
    era: Era | None = setting(None, "nanochat: generation of the architecture; null: found by the tensors.")
    tokenizer: UserPath = setting(
        "auto", "nanochat: auto (where nanochat keeps it), none, or the folder that it lies in."
    )
    moments: bool = setting(True, "nanochat: take the optimizer's moments along where they are there.")
    paths: PathsSettings = setting(factory=PathsSettings)


Config = ImportConfig


def run(arguments: Sequence[str]) -> int:
    """The command."""
    config = compose("import", ImportConfig, arguments).config
    if config.source is None:
        raise UserError("source: is missing: it names the folder to read.", "For example source=~/.cache/nanochat")
    if (config.to is None) == (config.run is None):
        raise UserError("to: a folder for the bundle, or run: the name of a new run; give one of them.")
    _require_checkpoint(Path(config.source))
    if config.to is not None:
        require_free(Path(config.to))
    with loading_libraries():
        from nanochat_pl.cli._import import import_model
    import_model(config)
    return 0


def _require_checkpoint(source: Path) -> None:
    if not source.is_dir():
        raise UserError(
            f"source={source}: there is no such folder.",
            "A checkpoint is a folder of files: give that, not one of the files.",
        )
    if (source / STAGE).is_file():
        raise UserError(f"source={source}: is a bundle already.", "Use it as it is: bundle=…")
