"""Looks at the data of a stage before it is trained on: lengths, duplicates, overlap with evaluation sets, rows.

nanochat-pl doctor stage=base data=local data.path=texts
nanochat-pl doctor stage=sft run=NAME
nanochat-pl doctor stage=base model.depth=12 row=123456
nanochat-pl doctor stage=base run=NAME step=4711
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_pl.cli.run_record import own_settings
from nanochat_pl.cli.train import place_of
from nanochat_pl.common.console import print_table, progress, rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import ensure_folder, write_json, write_text
from nanochat_pl.common.imports import loading_libraries
from nanochat_pl.common.paths import cache_folder
from nanochat_pl.common.run_dir import StageFolder
from nanochat_pl.common.schema import UserPath, setting, to_plain
from nanochat_pl.config.compose import Composed
from nanochat_pl.config.experiment import compose_step
from nanochat_pl.config.overrides import take_key
from nanochat_pl.doctor.eval_sets import read_eval_bundle
from nanochat_pl.doctor.examine import examine, num_reads
from nanochat_pl.doctor.findings import Finding, failing, finding_of, findings
from nanochat_pl.doctor.plots import lengths_svg
from nanochat_pl.doctor.tables import tables
from nanochat_pl.training.config import TrainConfig
from nanochat_pl.training.stage_data.inherit import inherited

EXIT_FAILS = 1
JSON, PICTURE = "doctor.json", "lengths.svg"


@dataclass(frozen=True)
class DoctorConfig(TrainConfig):
    """The root of configs/doctor.yaml: the keys of train, and what to look at."""

    row: int | None = setting(
        None, "Show which documents this row of the training is made of, and nothing else. From 0.", at_least=0
    )
    step: int | None = setting(
        None, "The same of all rows of this step; counted as metrics.csv does, from 1.", at_least=1
    )
    max_documents: int = setting(
        100_000, "Documents of each split whose text is read; of more of them, an even sample.", at_least=1
    )
    eval_bundle: UserPath | None = setting(
        None, "Folder of evaluation sets (eval_data/**/*.jsonl) to look for in the training text."
    )


Config = DoctorConfig
HELP_KEYS = ("model.depth", "model.sequence_len", "data.path", "data.long_documents", "paths.runs")
EXTRA_KEYS = {
    "stage=base": "Whose data: base, mid or sft.",
    "run=NAME": "With a stage that has begun: its own settings, but for those that are given.",
    "experiment=NAME": "Take the settings of an experiment file (its shared keys and those of the stage).",
}


def run(arguments: Sequence[str]) -> int:
    """The command: 0, or 1 where something would break a run."""
    config, folder, cache = open_stage(arguments)
    with loading_libraries():
        from nanochat_pl.doctor.show_rows import row_lines, step_lines
        from nanochat_pl.doctor.stage_data import open_stage_data
    if config.row is not None or config.step is not None:
        for line in [
            *([] if config.row is None else row_lines(config, folder, cache, config.row)),
            *([] if config.step is None else step_lines(config, folder, cache, config.step)),
        ]:
            rank_zero_print(line)
        return 0
    bundle = {} if config.eval_bundle is None else read_eval_bundle(Path(config.eval_bundle))
    to = Path(config.paths.runs) / "doctor" / f"{folder.run}-{folder.stage}"
    try:
        data = open_stage_data(config, folder, cache)
    except UserError as error:
        problems = finding_of(error)
        _write_json(to, {"stage": folder.stage}, problems)
        return _show_findings(problems)
    splits = data.train, data.validation
    with progress("reading the documents", num_reads(splits, config.max_documents), "documents") as advance:
        found = examine(
            *splits,
            {**data.eval_sets, **bundle},
            config.max_documents,
            data.wanted_copies,
            validation_is_a_set=not data.metrics.is_chat,  # there it is made of the tasks' test parts
            advance=advance,
        )
    for title, columns, rows, notes in tables(data.metrics, found):
        rank_zero_print()
        print_table(columns, rows, title=title)
        for note in notes:
            rank_zero_print(note)
    noun = "conversations" if data.metrics.is_chat else "documents"
    row_tokens = next(rows.sequence_len for rows in data.metrics.rows.values())
    picture = lengths_svg(to.name, noun, data.train.lengths, data.validation.lengths, row_tokens)
    write_text(ensure_folder(to) / PICTURE, picture)
    problems = [*findings(data.metrics, found), *data.shortfall]
    _write_json(to, {**to_plain(data.metrics), "found": to_plain(found)}, problems)
    code = _show_findings(problems)
    rank_zero_print(f"{to / PICTURE}, {to / JSON}")
    return code


def open_stage(arguments: Sequence[str]) -> tuple[DoctorConfig, StageFolder, Path]:
    """The settings of a stage as the command takes them, its folder, and the cache.

    Args:
        arguments: ``stage=sft``, ``run=NAME`` and further keys of the command.

    Raises:
        UserError: something is wrong with the settings, or the stage has no rows that could be read beforehand.
    """
    composed, folder = _composed(arguments)
    config = inherited(composed.config, folder, composed.given)
    assert isinstance(config, DoctorConfig)
    with loading_libraries():
        from nanochat_pl.training.stage_data.source import chosen_data
    cache = cache_folder(config.paths)
    return dataclasses.replace(config, data=chosen_data(config, folder, cache)), folder, cache


def _composed(arguments: Sequence[str]) -> tuple[Composed[DoctorConfig], StageFolder]:
    """The settings, with the folder of the stage. Of a run that is named, those that the stage was begun with."""
    stage, _ = take_key(arguments, "stage")
    composed: Composed[DoctorConfig] = compose_step("doctor", stage or "base", DoctorConfig, arguments)
    if not composed.config.stage.definition.has_model:
        raise UserError(
            f"stage={(name := composed.config.stage.name)}: a {name} is trained on text without rows.",
            "Say stage=base, which looks at the same text, stage=mid or stage=sft.",
        )
    if composed.config.stage.definition.trains_on_answers:
        raise UserError(
            f"stage={composed.config.stage.name}: its rows are written while it trains.",
            "nanochat-pl inspect run=NAME rollout=STEP:I shows one of them.",
        )
    folder = place_of(Composed[TrainConfig](composed.config, given=composed.given, experiment=composed.experiment))
    if composed.config.run is not None and (own := own_settings(folder, DoctorConfig)):
        composed = compose_step("doctor", stage or "base", DoctorConfig, arguments, own)
    return composed, folder


def _show_findings(problems: Sequence[Finding]) -> int:
    """Print what is wrong, and give the exit code."""
    rank_zero_print()
    for finding in problems:
        rank_zero_print(
            f"{'fails' if finding.fails else 'warning'}: {finding.problem}", style="bold red" if finding.fails else ""
        )
        if finding.fix:
            rank_zero_print(f"  {finding.fix}")
    if not problems:
        rank_zero_print("Nothing was found that would break or spoil a run.")
    return EXIT_FAILS if failing(problems) else 0


def _write_json(to: Path, metrics: dict[str, Any], problems: Sequence[Finding]) -> None:
    ensure_folder(to)
    write_json(to / JSON, {**metrics, "findings": to_plain(list(problems)), "fails": failing(problems)})
