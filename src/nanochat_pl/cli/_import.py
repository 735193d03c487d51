"""What `nanochat-pl import` does once its settings are read."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_pl.common.console import next_steps, rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import write_json
from nanochat_pl.common.paths import run_keys
from nanochat_pl.common.run_dir import StageFolder, stage_folder
from nanochat_pl.convert.huggingface.read import IMPORTED, is_huggingface, read_huggingface, stage_of_huggingface
from nanochat_pl.convert.nanochat.layout import choose_checkpoint, stage_of
from nanochat_pl.convert.nanochat.read import read_nanochat
from nanochat_pl.convert.output_dir import parents_removed_on_error
from nanochat_pl.convert.report import CERTIFICATE, Imported, save_imported

if TYPE_CHECKING:
    from nanochat_pl.cli.import_ import ImportConfig


def import_model(config: ImportConfig) -> None:
    """Read the model that the settings name, and write it with its certificate."""
    assert config.source is not None
    source = Path(config.source)
    if is_huggingface(source):
        _refuse_keys_of_nanochat(config)
    if config.run is not None:
        folder = stage_folder(Path(config.paths.runs), config.run, _stage_in(source, config))
        _require_absent(folder)
        imported = _read_and_tell(source, config)
        bundle, model = _save_as_stage(imported, folder), run_keys(config.run, Path(config.paths.runs))
        metrics = ""  # they lie in the run
    else:
        assert config.to is not None
        to = Path(config.to)
        imported = _read_and_tell(source, config)
        bundle = save_imported(imported, to)
        model = shlex.quote(f"bundle={bundle}")
        metrics = " " + shlex.quote(f"to={bundle.with_name(f'{bundle.name}-evaluation')}")
    rank_zero_print(f"bundle: {bundle}")
    rank_zero_print(f"certificate: {bundle / f'{CERTIFICATE}.md'}")
    if imported.tokenizer is not None:
        measure = f"nanochat-pl evaluate {model}{metrics}"
        next_steps([("talk to it", f"nanochat-pl chat {model}"), ("measure it", measure)])


def _refuse_keys_of_nanochat(config: ImportConfig) -> None:
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    given = [name for name in ("tag", "step", "era", "tokenizer", "moments") if getattr(config, name) != usual[name]]
    if given:
        problems = [f"{name}: has no meaning for a folder of transformers." for name in given]
        raise UserError(problems, f"Leave {' and '.join(given)} out.")


def _stage_in(source: Path, config: ImportConfig) -> str:
    """The stage that will be read, found without reading a weight."""
    if is_huggingface(source):
        stage = stage_of_huggingface(source, config.stage)
        if stage == IMPORTED:
            raise UserError(
                f"{source}: does not say which stage of a run it is.",
                "Say it: stage=base for a model that has read text, stage=sft for one that answers.",
            )
        return stage
    return stage_of(choose_checkpoint(source, config.stage, config.tag, config.step), config.stage)


def _read_and_tell(source: Path, config: ImportConfig) -> Imported:
    imported = _read(source, config)
    for line in imported.report.summary():
        rank_zero_print(line)
    return imported


def _read(source: Path, config: ImportConfig) -> Imported:
    """What lies in the folder, whatever it is."""
    if is_huggingface(source):
        return read_huggingface(source, config.stage)
    return read_nanochat(
        source,
        stage=config.stage,
        tag=config.tag,
        step=config.step,
        era=config.era,
        tokenizer=config.tokenizer,
        moments=config.moments,
    )


def _require_absent(folder: StageFolder) -> None:
    if folder.status != "absent":
        raise UserError(f"{folder.path}: is there already.", "Give the run another name: run=…")


def _save_as_stage(imported: Imported, folder: StageFolder) -> Path:
    """The bundle as the finished stage of a run."""
    with parents_removed_on_error(folder.path), folder.undone_on_error():
        folder.create()
        bundle = save_imported(imported, folder.bundle)
        stage = imported.stage
        write_json(folder.path / "finished.json", {"step": stage.step, "metrics": stage.metrics, "seconds": 0.0})
    return bundle
