"""What is measured as jobs, one for each task, and the cache of what they gave.

``tasks/SUITE/NAME.json`` in the folder of the results holds what a job gave and all that this follows from: the model
(hashes of its files, the type that it computes in), the problems, the settings, the version of the measuring. It is
taken again where the hash of all that is the same. Of records of other numbers of problems (``limit``) all are kept,
whatever else was set otherwise: the one with most of them there, the others in ``tasks/SUITE/n=NUMBER/NAME.json``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nanochat_pl.bundle.bundle import Bundle, naming_weights
from nanochat_pl.bundle.layout import CONFIG, MODEL, TOKENIZER
from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import ensure_folder, read_json, sha256_of_file, write_json
from nanochat_pl.data.cache.content_cache import fingerprint_of
from nanochat_pl.distributed import coordination
from nanochat_pl.evaluation.results import METRICS_VERSION, TaskResult, from_plain, to_plain
from nanochat_pl.evaluation.suites import Suite, SuiteResult, suite_of
from nanochat_pl.evaluation.tables import show_suite

FORMAT = 1
FOLDER = "tasks"
MAX_BYTES = 2**30  # of a file that is read: it holds every answer


@dataclass(frozen=True)
class Measured:
    """What a job gave.

    Attributes:
        plain: of what is no task: metrics by name (bpb), rows for people (samples).
    """

    results: list[TaskResult] = field(default_factory=list)
    plain: Any = None

    def to_json(self) -> dict[str, Any]:
        return {"results": [to_plain(each) for each in self.results], "plain": self.plain}

    @staticmethod
    def from_json(value: Mapping[str, Any], where: str) -> Measured:
        """The inverse of :meth:`to_json`, of data that anybody may have written."""
        rows = value.get("results")
        if not isinstance(rows, list):
            raise UserError(f"{where}: results: must be a list.")
        results = [from_plain(row, f"{where}: results[{number}]") for number, row in enumerate(rows)]
        return Measured(results, value.get("plain"))


@dataclass(frozen=True)
class Job:
    """One task of a suite, opened: its data is there.

    Attributes:
        problems: what its problems are a function of, as plain data: two models can be compared where it is the same.
        asked: further settings that the metrics depend on.
        together: whether all processes take part; else the main one measures alone.
    """

    suite: Suite
    name: str
    problems: Mapping[str, Any]
    asked: Mapping[str, Any]
    measure: Callable[[Bundle], Measured]
    together: bool = True

    def run(self, bundle: Bundle) -> Measured:
        """Measure a model: called on all processes, and all get what was found."""
        with naming_weights(bundle):
            if self.together:
                return self.measure(bundle)
            found = coordination.run_on_rank_zero(lambda: self.measure(bundle).to_json())
            return Measured.from_json(found, self.name)


@dataclass(frozen=True)
class Record:
    """What a job gave, and what that follows from; ``version`` is that of the measuring."""

    model: Mapping[str, Any]
    problems: Mapping[str, Any]
    asked: Mapping[str, Any]
    version: Any
    measured: Measured

    @property
    def fingerprint(self) -> str:
        """Hash of all that the result follows from."""
        return fingerprint_of(dict(self.model), dict(self.problems), dict(self.asked), self.version)

    @property
    def settings(self) -> dict[str, Any]:
        """What may have been set otherwise for the same model and problems."""
        return {**self.asked, "dtype": self.model.get("dtype")}

    @property
    def n(self) -> int | None:
        """The number of problems, where it is a setting."""
        n = self.asked.get("n")
        return n if isinstance(n, int) else None

    def has_problems_of(self, job: Job) -> bool:
        """Whether another model would have been given the same problems."""
        return fingerprint_of(dict(self.problems)) == fingerprint_of(dict(job.problems))

    def is_of_same_task(self, other: Record) -> bool:
        """Whether the model, the problems and the version are the same, under whatever settings."""
        as_other = replace(self, asked=other.asked, model={**self.model, "dtype": other.model.get("dtype")})
        return as_other.fingerprint == other.fingerprint


def identity_of(bundle: Bundle) -> dict[str, Any]:
    """What the metrics of a bundle depend on: its files, and the type that it computes in."""
    hashes = {name: sha256_of_file(bundle.path / name) for name in (MODEL, CONFIG, TOKENIZER)}
    return {**hashes, "dtype": str(bundle.net.compute_dtype).removeprefix("torch.")}


def measure(
    bundle: Bundle, jobs: Sequence[Job], model: Mapping[str, Any], to: Path, known: Path | None = None
) -> list[SuiteResult]:
    """Do what has not been done yet, and keep each task as soon as it is finished.

    Args:
        jobs: what to measure, those of a suite together.
        model: :func:`identity_of` it.
        known: another folder where there may be some.

    Returns:
        what was found, of each suite; whole on the main process.
    """
    found: dict[int, Measured] = {}

    def look() -> list[int]:
        for number, job in enumerate(jobs):
            for folder in (to, known):
                if number not in found and folder and (measured := find(folder, model, job)):
                    found[number] = measured
        again = [job.name for number, job in enumerate(jobs) if number not in found and path_of(to, job).exists()]
        if again:
            rank_zero_print(f"Measured again, as the model, the problems or settings are others: {', '.join(again)}.")
        return [*found]

    done = coordination.run_on_rank_zero(look)
    if done:
        rank_zero_print(f"Measured before: {', '.join(jobs[number].name for number in done)}.")
    suites = []
    for suite, members in itertools.groupby(enumerate(jobs), key=lambda each: each[1].suite):
        of_suite = []
        for number, job in members:
            if number not in done:
                found[number] = job.run(bundle)
                for each in found[number].results:
                    rank_zero_print(f"{each.name}: {100 * each.accuracy:.1f} ± {100 * each.stderr:.1f} %, n {each.n:,}")
                coordination.run_on_rank_zero(lambda: write_record(to, model, job, found[number]))  # noqa: B023
            of_suite += [found[number]] if number in found else []
        plain = next((each.plain for each in of_suite if each.plain is not None), None)
        suites.append(suite_of(suite, [result for each in of_suite for result in each.results], plain))
        coordination.run_on_rank_zero(lambda: show_suite(suites[-1]))
    return suites


def of_most_problems(
    to: Path, model: Mapping[str, Any], jobs: Sequence[Job], suites: Sequence[SuiteResult]
) -> list[SuiteResult]:
    """What is written of each suite: of each task the metrics of most problems, those of fewer beside them.

    Settings that were others then are in the remarks.
    """
    written = []
    for suite in suites:
        records = {job.name: _of_other_n(to, model, job) for job in jobs if job.suite == suite.name}
        tasks, fewer = [], []
        for task in suite.tasks:
            larger = records.get(task.name)
            if larger and (larger.n or 0) > task.n and larger.measured.results:
                fewer.append(task)
                task = larger.measured.results[0]
            tasks.append(task)
        if fewer:
            kept = [f"{task.name} (n {task.n:,})" for task in tasks if task.name in {each.name for each in fewer}]
            rank_zero_print(
                f"{suite.name}: the metrics of more problems stay in the results and the report: {', '.join(kept)}."
            )
        written.append(replace(suite_of(suite.name, tasks, suite.plain), fewer=fewer))
    return written


def path_of(folder: Path, job: Job, n: int | None = None) -> Path:
    """The file of a task in a folder of results; of one with fewer problems than another, their number is given.

    Names of tasks of others may have any signs.
    """
    place = folder / FOLDER / job.suite
    return (place if n is None else place / f"n={n}") / f"{quote(job.name, safe=' ')}.json"


def find(folder: Path, model: Mapping[str, Any], job: Job) -> Measured | None:
    """What a task gave before; None where it has to be measured, because nothing fits or a file is damaged."""
    wanted = Record(model, job.problems, job.asked, METRICS_VERSION, Measured())
    for n in dict.fromkeys((None, wanted.n)):
        record = _read_undamaged(folder, job, n)
        if record and record.fingerprint == wanted.fingerprint:
            return record.measured
    return None


def write_record(folder: Path, model: Mapping[str, Any], job: Job, measured: Measured) -> None:
    """Keep what a task gave, beside what it gave of more or fewer problems."""
    record = Record(model, job.problems, job.asked, METRICS_VERSION, measured)
    path, before = path_of(folder, job), _of_other_n(folder, model, job)
    if before and before.n and record.n:
        if before.n > record.n:
            path = path_of(folder, job, record.n)
        else:
            fewer = path_of(folder, job, before.n)
            ensure_folder(fewer.parent)
            path.replace(fewer)
    key = {"model": dict(model), "problems": dict(job.problems), "asked": dict(job.asked)}
    write_json(path, {"format": FORMAT, "version": METRICS_VERSION, **key, **measured.to_json()}, surrogates=True)


def read_record(folder: Path, job: Job, n: int | None = None) -> Record | None:
    """What is known of a task, whatever it follows from; None where nothing is. ``n`` is as in :func:`path_of`.

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
    measured = Measured.from_json(value, str(path))
    return Record(value["model"], value["problems"], value["asked"], value.get("version"), measured)


def differing_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of the settings that were others, but for the number of problems."""
    return [name for name in {**before, **now} if name != "n" and before.get(name) != now.get(name)]


def _of_other_n(folder: Path, model: Mapping[str, Any], job: Job) -> Record | None:
    """The record of a task of another number of its problems, whatever else was set otherwise."""
    now = Record(model, job.problems, job.asked, METRICS_VERSION, Measured())
    record = _read_undamaged(folder, job)
    if not record or not record.n or not now.n or record.n == now.n or not record.is_of_same_task(now):
        return None
    before = record.settings
    said = [f"{key}={before[key]}" for key in differing_settings(before, now.settings) if key in before]
    if not said:
        return record
    results = []
    for each in record.measured.results:
        remark = "; ".join(filter(None, (each.remark, f"measured with {', '.join(said)}")))
        results.append(replace(each, details={**each.details, "remark": remark}))
    return replace(record, measured=replace(record.measured, results=results))


def _read_undamaged(folder: Path, job: Job, n: int | None = None) -> Record | None:
    """As :func:`read_record`; None of a damaged file: it is written anew."""
    try:
        return read_record(folder, job, n)
    except UserError:
        return None
