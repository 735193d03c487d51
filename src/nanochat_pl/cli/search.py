"""Searches for the settings with the best metric, with Optuna; each trial is a run of `nanochat-pl train`.

nanochat-pl search stage=base max_steps=200 'optim.matrix_lr=tag(log,interval(0.002,0.2))' run=lr
nanochat-pl search model.depth=2,4 'schedule.warmup_steps=int(interval(0,80))' search.trials=30 run=small

Keys with several values are searched over, the others are those of train. The same command goes on, also while others
of it run: they share the trials.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_pl.cli._study import SearchSettings, Study, Trial, best_of, ended
from nanochat_pl.cli._subprocess import is_stop, run_child
from nanochat_pl.cli._sweep_state import last_lines, log_of, sweep_folder, wait_until_free
from nanochat_pl.cli.run_record import settings_that_matter
from nanochat_pl.cli.train import compose_train
from nanochat_pl.common.console import ignore_broken_pipe, print_table, rank_zero_print
from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.common.files import ensure_folder
from nanochat_pl.common.imports import loading_libraries
from nanochat_pl.common.locks import held_lock, try_lock
from nanochat_pl.common.paths import PathsSettings
from nanochat_pl.common.run_dir import stage_folder
from nanochat_pl.common.schema import setting
from nanochat_pl.comparison.metrics import DEFAULT
from nanochat_pl.config.compose import compose
from nanochat_pl.config.overrides import split_override, take_key
from nanochat_pl.config.search_space import Choice, Dimension, split_space, text_of
from nanochat_pl.training.config import TrainConfig


@dataclass(frozen=True)
class SearchConfig:
    """The root of configs/search.yaml."""

    run: str | None = setting(
        None, "How the names of the runs begin, NAME-trial1 …; null: the experiment's, or search."
    )
    search: SearchSettings = setting(factory=SearchSettings)
    paths: PathsSettings = setting(factory=PathsSettings)


Config = SearchConfig
HELP_KEYS = tuple(f"search.{name}" for name in SearchSettings.__dataclass_fields__)
EXTRA_KEYS = {"KEY=VALUE": "Any key of train; one with several values is searched over."}


@ignore_broken_pipe()
def run(arguments: Sequence[str]) -> int:
    """The command."""
    study, fixed = study_of(arguments)
    ensure_folder(study.folder)
    while (claimed := _claim(study)) is not None:
        trial, asked, lock = claimed
        with lock:
            code = _train(study, fixed, trial, asked)
        if is_stop(code):
            rank_zero_print("The same command goes on with what is not finished.")
            return code
    return _tell(study, fixed)


def study_of(arguments: Sequence[str]) -> tuple[Study, list[str]]:
    """The search that a command line asks for, and the overrides that all of its trials share.

    Raises:
        UserError: something is wrong with a key, or nothing is searched over.
    """
    own = [text for text in arguments if split_override(text)[0].partition(".")[0] in ("search", "run", "paths")]
    config = compose("search", SearchConfig, own).config
    of_train = [text for text in arguments if split_override(text)[0].partition(".")[0] not in ("search", "run")]
    fixed, space = split_space(of_train)
    if not space:
        raise UserError(
            "search: no key has several values.", "Give some: nanochat-pl search 'optim.matrix_lr=interval(0.01,0.1)'"
        )
    experiment = take_key(fixed, "experiment")[0]
    base = config.run or Path(experiment).stem or "search"
    problems: dict[str, None] = {}
    tried = [_ends(dimension) for dimension in space.values()]
    for number in range(max(map(len, tried))):
        values = [text_of(key, ends[number % len(ends)]) for key, ends in zip(space, tried, strict=True)]
        try:
            composed = compose_train([*fixed, *values, f"run={base}"])
        except UserError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise UserError(list(problems), "Keys and their meaning: nanochat-pl train --help, nanochat-pl search --help")
    if composed.config.stage.definition.starts_from_model or not composed.config.stage.definition.has_model:
        raise UserError(f"search: the stage {composed.config.stage.name} is not searched over, base is.")
    _require_measured(config.search.metric, composed.config)
    stage, runs = composed.config.stage.name, Path(config.paths.runs)
    matters = settings_that_matter(composed.plain(), stage)
    kept = {key: value for key, value in matters.items() if key not in space and key.split(".")[0] not in space}
    folder = sweep_folder(runs, ["search", base, stage])
    return Study(config.search, space, runs, base, stage, folder, kept), fixed


def _require_measured(metric: str, config: TrainConfig) -> None:
    """Raise :class:`UserError` for a metric that a training of these settings does not have."""
    if metric == DEFAULT or config.stage.module is not None:  # which may have metrics of its own
        return
    with loading_libraries():
        from nanochat_pl.evaluation.validation import name_by_source
        from nanochat_pl.training.callbacks.metrics_csv import COLUMNS, COLUMNS_BY_SOURCE

    of_sources = [name_by_source(column, source) for source in config.data.parts for column in COLUMNS_BY_SOURCE]
    known = [name for name in (*COLUMNS[1:], *of_sources) if "_stderr" not in name]
    benchmark, every = (
        ("chat", "chat_every_steps") if config.stage.trains_on_conversations else ("core", "core_every_steps")
    )
    if metric.startswith(f"{benchmark}/") and getattr(config.evaluation, every) is not None:
        return
    if metric.startswith(f"{benchmark}/"):
        raise UserError(f"search.metric={metric}: is not measured with evaluation.{every}=null.")
    if metric not in known:
        raise UserError(
            f"search.metric={metric}: is not measured; {did_you_mean(metric, [*known, f'{benchmark}/mean'])}",
            f"A stage of this kind has: {', '.join([*known, f'{benchmark}/mean'])}.",
        )


def _ends(dimension: Dimension) -> tuple[Any, ...]:
    """The values that are checked before the first trial: all of a choice, else the lowest and the highest."""
    return dimension.values if isinstance(dimension, Choice) else (dimension.low, dimension.high)


def _claim(study: Study) -> tuple[Trial, Any, contextlib.ExitStack] | None:
    """The next trial, with Optuna's and the lock that is held while it trains; None: there are enough."""
    with held_lock(study.folder / "lock", patience_seconds=600):
        trials = study.trials()
        trial = study.abandoned(trials)
        if trial is None and len(trials) >= study.settings.trials:
            return None
        asked = study.ask(trials, None if trial is None else trial.params)
        if trial is None:
            trial = Trial(max((each.number for each in trials), default=0) + 1, dict(asked.params))
        lock = contextlib.ExitStack()
        try_lock(lock.enter_context(study.lock_of(trial.number).open("a", encoding="utf-8")))
        study.keep(trial)
    return trial, asked, lock


def _train(study: Study, fixed: Sequence[str], trial: Trial, asked: Any) -> int:
    name, log = study.run_of(trial.number), log_of(study.folder, trial.number, f"trial{trial.number}")
    values = [text_of(key, value) for key, value in trial.params.items()]
    rank_zero_print(f"trial {trial.number}: {' '.join(values)}, its log is {log}", style="bold")
    known: dict[int, float] = {}
    pruned_at: list[int] = []

    def is_worse() -> bool:
        for step, value in study.measured(trial.number).items():
            if step not in known:
                known[step] = value
                asked.report(value, step)
                if asked.should_prune():
                    pruned_at.append(step)
        return bool(pruned_at)

    watch = is_worse if study.settings.is_measured_on_the_way else None
    folder = stage_folder(study.runs, name, study.stage)
    wait_until_free([folder])
    code = run_child(["train", *fixed, *values, f"run={name}"], None, log, watch)
    finished = folder.finished() if folder.status == "finished" else {}
    if finished:
        code, value = 0, finished.get("metrics", {}).get(study.settings.metric)
        trial = ended(trial, "finished" if value is not None else "failed", value)
    elif code == 128 + signal.SIGTERM and pruned_at:
        code, trial = 0, ended(trial, "pruned", known[pruned_at[0]])
    elif not is_stop(code):
        trial = ended(trial, "failed", None)
    with held_lock(study.folder / "lock", patience_seconds=600):
        study.keep(trial)
        trials = study.trials()
    if is_stop(code):
        return code
    measured = "" if trial.value is None else f", {study.settings.metric} {trial.value:.4f}"
    best = best_of(trials, study.settings.direction)
    so_far = "" if best is None else f"; the best so far: trial {best.number}, {best.value:.4f}"
    rank_zero_print(f"trial {trial.number}: {trial.state}{measured}{so_far}")
    if trial.state == "failed":
        for line in last_lines(log):
            rank_zero_print(f"  {line}")
    return code


def _tell(study: Study, fixed: Sequence[str]) -> int:
    """The table of all trials and the command of the best one; gives the exit code."""
    trials, keys = study.trials(), list(study.space)
    sign = 1 if study.settings.direction == "minimize" else -1
    order = sorted(trials, key=lambda trial: (trial.state != "finished", sign * (trial.value or 0.0)))
    print_table(
        ("trial", *keys, "outcome", study.settings.metric),
        [
            (
                trial.number,
                *(_shown(trial.params[key]) for key in keys),
                trial.state,
                None if trial.value is None else f"{trial.value:.4f}",
            )
            for trial in order
        ],
    )
    best = best_of(trials, study.settings.direction)
    if best is None:
        rank_zero_print("No trial is finished. Their logs say why.")
        return 1
    command = ["nanochat-pl", "train", *fixed, *(text_of(key, value) for key, value in best.params.items())]
    rank_zero_print(f"The best is {study.run_of(best.number)}: {shlex.join(command)}")
    return 0


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "null" if value is None else str(value)
