"""The other model of ``evaluate against=…``: what is meant, and what a folder of results says of the same problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_pl.bundle.layout import MODEL, TOKENIZER
from nanochat_pl.bundle.stage_info import load_stage_info
from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.paths import locate_stage
from nanochat_pl.common.run_dir import STAGES, is_stage, stages_in
from nanochat_pl.evaluation.jobs import FOLDER, Job, Measured, Record, differing_settings, read_record
from nanochat_pl.evaluation.results import METRICS_VERSION
from nanochat_pl.evaluation.suites import SuiteResult, require_chat_model, suite_of

_NAME_ONE = "Name RUN, RUN/STAGE, a bundle or a folder of results."


@dataclass(frozen=True)
class Other:
    """What is compared with.

    Attributes:
        bundle: the model's folder; None: there are results only.
        results: the folder in which results of it are, or may be.
    """

    name: str
    bundle: Path | None
    results: Path | None


def locate_other(against: str, runs: Path) -> Other:
    """What ``against`` means: a folder of results, a bundle, the folder of a stage, RUN or RUN/STAGE.

    Raises:
        UserError: none of them, or a run that has no finished stage.
    """
    try:
        other = _other(against, runs)
    except UserError as error:
        raise UserError([f"against={against}: {line}" for line in error.problems], error.fix) from error
    if other.bundle is not None and not (other.bundle / TOKENIZER).is_file():
        raise UserError(f"against={against}: {other.bundle} has no tokenizer, so nothing can be measured.")
    return other


def _other(against: str, runs: Path) -> Other:
    if not against.strip():
        raise UserError("names nothing.", _NAME_ONE)
    path = Path(against)
    for folder in (runs / path, path):  # a run comes before a folder of that name
        if (folder / FOLDER).is_dir():
            return Other(against, None, folder)
        if (folder / MODEL).is_file():
            return Other(against, folder, None)
        if is_stage(folder) or stages_in(folder):
            return _stage_of(against, folder)
    if path.is_dir():
        raise UserError("is no bundle, and no folder of results that evaluate has written.", _NAME_ONE)
    if path.exists() or path.is_absolute() or len(path.parts) > 2:
        raise UserError("is no folder." if path.exists() else "there is no such folder.", _NAME_ONE)
    return _stage_of(against, runs / path)  # says which runs there are


def _stage_of(name: str, path: Path) -> Other:
    """A stage of a run: FOLDER/RUN/STAGE, or of FOLDER/RUN the newest."""
    run, stage = (path.parent, path.name) if path.name in STAGES or is_stage(path) else (path, None)
    found = locate_stage(run.name, stage, run.parent)
    return Other(name, found.bundle, found.runs / found.run / "evaluation" / found.stage)


def comparable(jobs: Sequence[Job], other: str) -> list[Job]:
    """Those that give metrics. Raises :class:`UserError` where there are none."""
    found = [job for job in jobs if job.suite not in ("samples", "tokenizer")]
    if not found:
        named = " and ".join(dict.fromkeys(job.suite for job in jobs))
        raise UserError(f"against={other}: {named} are no metrics to compare.", "Name other suites: suites=[…]")
    return found


def require_can_be_asked(bundle: Path, jobs: Sequence[Job]) -> None:
    """Refuse a model that cannot be asked one of these tasks."""
    stage = load_stage_info(bundle)
    for suite in dict.fromkeys(job.suite for job in jobs):
        require_chat_model(stage, bundle, suite)


def read_other(other: Other, jobs: Sequence[Job], to: Path, model: Mapping[str, Any]) -> list[SuiteResult]:
    """What a folder of results says of these tasks: read before anything is written, as it may be the same folder.

    Args:
        to: where this model's results go.
        model: identity of this model: of the same folder its own results, after a stop, are not those of the other one.

    Raises:
        UserError: there is nothing to compare with, or a file is damaged.
    """
    assert other.results is not None
    mine = model if other.results.resolve() == to.resolve() else None
    records = [(job, read_record(other.results, job)) for job in jobs]
    same = [(job, record) for job, record in records if record is not None and record.has_problems_of(job)]
    if not same:
        raise UserError(
            f"against={other.name}: has none of these tasks with the same problems: "
            f"{', '.join(job.name for job in jobs)}.",
            "Compare with a model, against=RUN or against=BUNDLE: then it is measured on them.",
        )
    found: dict[str, list[Measured]] = {}
    for job, record in records:
        if record is None or not record.has_problems_of(job) or record.model == mine:
            why = "is not there" if record is None else "has other problems there"
            why = "is of this very model" if record is not None and record.model == mine else why
            rank_zero_print(f"{job.suite}, {job.name}: {why}, so it is not compared.")
            continue
        if differing := _differing(record, job):
            rank_zero_print(f"{job.suite}, {job.name}: was measured there with {differing}.")
        found.setdefault(job.suite, []).append(record.measured)
    if not found:
        raise UserError(
            f"against={other.name}: has results of this very model by now.",
            "Compare with a copy of the folder, made before, or with the other model: against=RUN or against=BUNDLE.",
        )
    return [
        suite_of(suite, [result for each in measured for result in each.results], measured[0].plain)
        for suite, measured in found.items()
    ]


def _differing(record: Record, job: Job) -> str:
    """What differs but for the number of problems: pairs are made of those that both have."""
    names = differing_settings(record.asked, job.asked)
    settings = [f"{name}={record.asked.get(name)} (here {job.asked.get(name)})" for name in names]
    return ", ".join([*settings, *([] if record.version == METRICS_VERSION else ["another version of nanochat_pl"])])
