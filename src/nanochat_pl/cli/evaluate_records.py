"""Records of finished tasks, one file each: what is there need not be measured again.

``tasks/SUITE/NAME.json`` in the folder of the results holds what a task gave, and all that this is a function of: the
model (hashes of its files, the type it computes in), the problems, the settings, the version of the measuring. Only
what agrees with all of it is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nanochat_pl.bundle import Bundle
from nanochat_pl.bundle.bundle import CONFIG, MODEL, TOKENIZER
from nanochat_pl.cli.evaluate_suites import Job, Measured, from_plain, to_json
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_json, sha256_of_file, write_json
from nanochat_pl.evaluation.results import FIGURES_VERSION

FORMAT = 1
FOLDER = "tasks"
MAX_BYTES = 2**30  # of a file that is read: it holds every answer


def identity_of(bundle: Bundle) -> dict[str, Any]:
    """What the figures of a bundle depend on: its files, and the type that it computes in."""
    hashes = {name: sha256_of_file(bundle.path / name) for name in (MODEL, CONFIG, TOKENIZER)}
    return {**hashes, "dtype": str(bundle.net.compute_dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class Record:
    """A task that was measured. ``version`` is that of the measuring."""

    model: Mapping[str, Any]
    problems: Mapping[str, Any]
    asked: Mapping[str, Any]
    version: Any
    measured: Measured


def path_of(folder: Path, job: Job) -> Path:
    """The file of a task in a folder of results. Names of tasks of others may have any signs."""
    return folder / FOLDER / job.suite / f"{quote(job.name, safe=' ')}.json"


def write_record(folder: Path, model: Mapping[str, Any], job: Job, measured: Measured) -> None:
    """Keep what a task gave."""
    key = {"model": dict(model), "problems": dict(job.problems), "asked": dict(job.asked)}
    write_json(
        path_of(folder, job),
        {"format": FORMAT, "version": FIGURES_VERSION, **key, **to_json(measured)},
        surrogates=True,
    )


def read_record(folder: Path, job: Job) -> Record | None:
    """What is known of a task, whatever it was a function of; None where nothing is.

    Raises:
        UserError: the file is damaged, or of another version.
    """
    path = path_of(folder, job)
    if not path.is_file():
        return None
    value = read_json(path, MAX_BYTES, surrogates=True)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"{path}: is no record of a task that this version can read.")
    for key in ("model", "problems", "asked"):
        if not isinstance(value.get(key), dict):
            raise UserError(f"{path}: {key}: must be a group of named values.")
    measured = from_plain(value, str(path))
    return Record(value["model"], value["problems"], value["asked"], value.get("version"), measured)


def find(folder: Path, model: Mapping[str, Any], job: Job) -> tuple[Measured | None, str]:
    """What a task of this model gave before, under the same settings. None where it has to be measured.

    Of what is there and does not fit, the reason is given, too.
    """
    try:
        record = read_record(folder, job)
    except UserError as error:
        return None, " ".join(error.problems)
    why = "" if record is None else _changes(record, model, job)
    return (None if record is None or why else record.measured), why


def _changes(record: Record, model: Mapping[str, Any], job: Job) -> str:
    """In what a record differs from what is asked; empty where in nothing."""
    if any(record.model.get(name) != model[name] for name in (MODEL, CONFIG, TOKENIZER)):
        return "The model is another one."
    if record.problems != job.problems:
        return "The problems are others."
    if record.version != FIGURES_VERSION:
        return "An earlier version of nanochat_pl measured otherwise."
    now = {**job.asked, "dtype": model["dtype"]}
    before = {**record.asked, "dtype": record.model.get("dtype")}
    names = [name for name in {**now, **before} if now.get(name) != before.get(name)]
    # A setting that has no say, as top_k where nothing is drawn, is not in the record.
    word, values = ("Before", before) if any(name in before for name in names) else ("Now", now)
    return f"{word}: {', '.join(f'{name}={values[name]}' for name in names if name in values)}." if names else ""
