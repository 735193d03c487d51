"""Compares with another model: the same problems, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_pl.bundle import Bundle
from nanochat_pl.bundle.bundle import MODEL, TOKENIZER, load_stage_info
from nanochat_pl.cli.evaluate_records import FOLDER, Record, read_record
from nanochat_pl.cli.evaluate_suites import Job, Measured, require_chat_model
from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.paths import locate_stage
from nanochat_pl.common.run_dir import STAGES
from nanochat_pl.evaluation.results import (
    FIGURES_VERSION,
    Difference,
    TaskResult,
    paired_difference,
    paired_summary,
)

_NAME_ONE = "Name RUN, RUN/STAGE, a bundle or a folder of results."


@dataclass(frozen=True)
class Other:
    """What is compared with.

    Attributes:
        name: for people, as it was typed.
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
    path = Path(against)
    if not against.strip():
        raise UserError("names nothing.", _NAME_ONE)
    if (runs / against).is_dir() and len(path.parts) <= 2:
        return _stage_of(against, runs / path)
    if (path / FOLDER).is_dir():
        return Other(against, None, path)
    for bundle in (path, runs / path):
        if (bundle / MODEL).is_file():
            return Other(against, bundle, None)
    if path.is_dir() and path.name not in STAGES and not any((path / stage).is_dir() for stage in STAGES):
        raise UserError("is no bundle, and no folder of results that evaluate has written.", _NAME_ONE)
    if not path.is_dir() and (path.exists() or path.is_absolute() or len(path.parts) > 2):
        raise UserError("is no folder." if path.exists() else "there is no such folder.", _NAME_ONE)
    return _stage_of(against, path if path.is_dir() else runs / path)


def _stage_of(name: str, path: Path) -> Other:
    """A stage of a run: FOLDER/RUN/STAGE, or of FOLDER/RUN the newest."""
    run, stage = (path.parent, path.name) if path.name in STAGES else (path, None)
    found = locate_stage(run.name, stage, run.parent)
    return Other(name, found.bundle, found.runs / found.run / "evaluation" / found.stage)


def comparable(jobs: Sequence[Job]) -> list[Job]:
    """Those that give figures."""
    return [job for job in jobs if job.suite not in ("samples", "tokenizer")]


def require_pairs(other: Other, jobs: Sequence[Job]) -> None:
    """Refuse what has nothing to compare, before anything is measured.

    Raises:
        UserError: there are no figures; the other is a model that cannot be asked; or results in which no task has the
            same problems, or a file is damaged.
    """
    without_pairs = " and ".join(dict.fromkeys(job.suite for job in jobs))
    jobs = comparable(jobs)
    if not jobs:
        raise UserError(
            f"against={other.name}: {without_pairs} are no figures to compare.", "Name other suites: suites=[…]"
        )
    if other.bundle is not None:
        stage = load_stage_info(other.bundle).stage
        for suite in dict.fromkeys(job.suite for job in jobs):
            require_chat_model(stage, other.bundle, suite)
        return
    assert other.results is not None
    found = [job for job in jobs if (record := read_record(other.results, job)) and record.problems == job.problems]
    if not found:
        names = ", ".join(job.name for job in jobs)
        raise UserError(
            f"against={other.name}: has none of these tasks with the same problems: {names}.",
            "Compare with a model, against=RUN or against=BUNDLE: then it is measured on them.",
        )


def known_results(other: Other, jobs: Sequence[Job], to: Path, model: Mapping[str, Any]) -> list[tuple[Job, Measured]]:
    """What a folder of results says of these tasks: read before anything is written, as it may be the same folder.

    Args:
        other: the folder.
        jobs: the tasks.
        to: where this model's results go.
        model: identity of this model: of the same folder its own results, after a stop, are not those of the other one.

    Raises:
        UserError: there is nothing to compare with.
    """
    assert other.results is not None
    mine = model if other.results.resolve() == to.resolve() else None
    found = [(job, measured) for job in comparable(jobs) if (measured := _known_result(other.results, job, mine))]
    if not found:
        raise UserError(
            f"against={other.name}: has results of this very model by now.",
            "Compare with a copy of the folder, made before, or with the other model: against=RUN or against=BUNDLE.",
        )
    return found


def _known_result(folder: Path, job: Job, mine: Mapping[str, Any] | None) -> Measured | None:
    """What a folder of results says of a task; None, and a line why, where it cannot be compared with."""
    record = read_record(folder, job)
    if record is None or record.problems != job.problems or record.model == mine:
        why = "is not there" if record is None else "is of this very model" if record.model == mine else ""
        rank_zero_print(f"{job.suite}, {job.name}: {why or 'has other problems there'}, so it is not compared.")
        return None
    if differing := _differing(record, job):
        rank_zero_print(f"{job.suite}, {job.name}: was measured there with {differing}.")
    return record.measured


def _differing(record: Record, job: Job) -> str:
    """What differs but for the number of problems: pairs are made of those that both have."""
    names = [name for name in {**record.asked, **job.asked} if name != "n"]
    settings = [
        f"{name}={record.asked.get(name)} (here {job.asked.get(name)})"
        for name in names
        if record.asked.get(name) != job.asked.get(name)
    ]
    return ", ".join([*settings, *([] if record.version == FIGURES_VERSION else ["another version of nanochat_pl"])])


def label_of(bundle: Bundle, identity: Mapping[str, Any]) -> str:
    """A folder's name for results of another model."""
    return f"{bundle.stage.stage}-{identity[MODEL][:16]}"


def differences(mine: Sequence[TaskResult], theirs: Sequence[TaskResult]) -> list[Difference]:
    """The paired difference of each task that both have. Raises :class:`UserError` where two have no common problem."""
    others = {each.name: each for each in theirs}
    return [paired_difference(each, others[each.name]) for each in mine if each.name in others]


def summary_difference(name: str, mine: Sequence[TaskResult], theirs: Sequence[TaskResult]) -> Difference | None:
    """The paired difference of two means over the tasks that both have; None where there are none."""
    common = {each.name for each in mine} & {each.name for each in theirs}
    return paired_summary(name, mine, theirs) if common else None


def difference_of_bits(mine: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """Difference of bits per byte and its standard error.

    Rows are cut by the model's own tokens, so there are no pairs: the error is that of two independent figures, and
    too large rather than too small.
    """
    if "bpb" not in mine or "bpb" not in theirs:
        return {}
    figures = {"difference": mine["bpb"] - theirs["bpb"]}
    if "bpb_stderr" in mine and "bpb_stderr" in theirs:
        figures["difference_stderr"] = math.hypot(mine["bpb_stderr"], theirs["bpb_stderr"])
    return figures
