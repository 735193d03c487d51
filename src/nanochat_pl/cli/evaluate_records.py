"""Records of finished tasks, one file each: what is there need not be measured again.

``tasks/SUITE/NAME.json`` in the folder of the results holds what a task gave, and all that this is a function of: the
model (hashes of its files, the type it computes in), the problems, the settings, the version of the measuring. Only
what agrees with all of it is taken. Of records of other numbers of problems (``limit``) all are kept, whatever else was
set otherwise: the one with most of them there, the others in ``tasks/SUITE/n=NUMBER/NAME.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nanochat_pl.bundle import Bundle
from nanochat_pl.bundle.bundle import CONFIG, MODEL, TOKENIZER
from nanochat_pl.cli.evaluate_suites import Job, Measured, from_plain, to_json
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import ensure_folder, read_json, sha256_of_file, write_json
from nanochat_pl.evaluation.results import FIGURES_VERSION, TaskResult

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


def path_of(folder: Path, job: Job, n: int | None = None) -> Path:
    """The file of a task in a folder of results; of one with fewer problems than another, their number is given.

    Names of tasks of others may have any signs.
    """
    place = folder / FOLDER / job.suite
    return (place if n is None else place / f"n={n}") / f"{quote(job.name, safe=' ')}.json"


def write_record(folder: Path, model: Mapping[str, Any], job: Job, measured: Measured) -> None:
    """Keep what a task gave, beside what it gave of more or fewer problems."""
    path, before = path_of(folder, job), _of_other_number(folder, model, job)
    if before is not None:
        if before.asked["n"] > job.asked["n"]:
            path = path_of(folder, job, job.asked["n"])
        else:
            fewer = path_of(folder, job, before.asked["n"])
            ensure_folder(fewer.parent)
            path.replace(fewer)
    key = {"model": dict(model), "problems": dict(job.problems), "asked": dict(job.asked)}
    write_json(
        path,
        {"format": FORMAT, "version": FIGURES_VERSION, **key, **to_json(measured)},
        surrogates=True,
    )


def of_more_problems(folder: Path, model: Mapping[str, Any], job: Job) -> Measured | None:
    """What a task gave of more problems than are asked for; None where it was not measured.

    Settings that were others then are in the remarks of the results.
    """
    record = _of_other_number(folder, model, job)
    if record is None or record.asked["n"] < job.asked["n"]:
        return None
    before, _, names = _settings(record, model, job)
    if said := ", ".join(f"{name}={before[name]}" for name in names if name in before and name != "n"):
        results = [_with_remark(each, f"measured with {said}") for each in record.measured.results]
        return replace(record.measured, results=results)
    return record.measured


def _with_remark(result: TaskResult, remark: str) -> TaskResult:
    own = result.details.get("remark")
    return replace(result, details={**result.details, "remark": f"{own}; {remark}" if own else remark})


def _of_other_number(folder: Path, model: Mapping[str, Any], job: Job) -> Record | None:
    """The record of a task of another number of its problems, whatever else was set otherwise."""
    try:
        record = read_record(folder, job)
    except UserError:  # it is written anew
        return None
    n = None if record is None else record.asked.get("n")
    if record is None or not isinstance(n, int) or "n" not in job.asked or n == job.asked["n"]:
        return None
    return None if _another_thing(record, model, job) else record


def read_record(folder: Path, job: Job, n: int | None = None) -> Record | None:
    """What is known of a task, whatever it was a function of; None where nothing is.

    Args:
        folder: of the results.
        job: the task.
        n: of fewer problems than the most: how many.

    Raises:
        UserError: the file is damaged, or of another version.
    """
    path = path_of(folder, job, n)
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
    why = ""
    for n in dict.fromkeys((None, job.asked.get("n"))):
        try:
            record = read_record(folder, job, n)
        except UserError as error:
            why = why or " ".join(error.problems)
            continue
        changes = "" if record is None else _changes(record, model, job)
        if record is not None and not changes:
            return record.measured, ""
        why = why or changes
    return None, why


def _changes(record: Record, model: Mapping[str, Any], job: Job) -> str:
    """In what a record differs from what is asked; empty where in nothing."""
    if another := _another_thing(record, model, job):
        return another
    before, now, names = _settings(record, model, job)
    # A setting that has no say, as top_k where nothing is drawn, is not in the record.
    word, values = ("Before", before) if any(name in before for name in names) else ("Now", now)
    return f"{word}: {', '.join(f'{name}={values[name]}' for name in names if name in values)}." if names else ""


def _another_thing(record: Record, model: Mapping[str, Any], job: Job) -> str:
    """Why a record is none of this model and these problems, under any settings; empty where it is one."""
    if any(record.model.get(name) != model[name] for name in (MODEL, CONFIG, TOKENIZER)):
        return "The model is another one."
    if record.problems != job.problems:
        return "The problems are others."
    return "" if record.version == FIGURES_VERSION else "An earlier version of nanochat_pl measured otherwise."


def _settings(record: Record, model: Mapping[str, Any], job: Job) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The settings of a record, those that are asked for, and the names of those that differ."""
    now = {**job.asked, "dtype": model["dtype"]}
    before = {**record.asked, "dtype": record.model.get("dtype")}
    return before, now, [name for name in {**now, **before} if now.get(name) != before.get(name)]
