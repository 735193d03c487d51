"""The trials of a search: what the ledger, and a file of those that were begun, know of them; and Optuna's study.

The study is made anew for each trial, so nothing is kept in a database: the values are those of the ledger. The file
``trials.json`` has what the ledger has not: which trials are under way, were pruned, or failed before they trained.
Workers change it in turn, under a lock; each holds a lock of its trial while it trains, so that one whose worker has
died is found and continued.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_object, write_json
from nanochat_pl.common.locks import try_lock
from nanochat_pl.common.run_dir import stage_folder
from nanochat_pl.common.schema import build_known, setting, to_plain
from nanochat_pl.config.search_space import Choice, Dimension
from nanochat_pl.ledger import newest, read_ledger
from nanochat_pl.report.read import read_stage

State = Literal["running", "finished", "failed", "pruned"]


@dataclass(frozen=True)
class SearchSettings:
    """Group `search`: what is looked for, and how."""

    trials: int = setting(20, "Trials in all, with those of earlier starts and of other workers.", at_least=1)
    metric: str = setting("val/bpb", "The metric whose last value counts.")
    direction: Literal["minimize", "maximize"] = setting("minimize", "Whether a small or a large value is good.")
    sampler: Literal["tpe", "random"] = setting("tpe", "tpe: learns from earlier trials where good values are.")
    random_trials: int = setting(10, "Trials with random values before tpe learns from them.", at_least=1)
    seed: int = setting(0, "Seed of the values that are tried.", at_least=0, at_most=2**31)
    prune: bool = setting(
        True, "Stop a trial that measures worse than the median of the others at the same step; val/… alone."
    )
    prune_after: int = setting(5, "Trials that are finished before one is stopped.", at_least=1)

    @property
    def is_measured_on_the_way(self) -> bool:
        """Whether the metric is one that is measured while it trains."""
        return self.prune and self.metric.startswith("val/")


@dataclass(frozen=True)
class Trial:
    """One set of values.

    Attributes:
        number: from 1; part of the run's name.
        params: the values by key.
        state: what has come of it.
        value: of the metric at its end; of a pruned one the last that was measured.
    """

    number: int
    params: dict[str, Any]
    state: State = "running"
    value: float | None = None


@dataclass(frozen=True)
class Study:
    """A search, in the folder that keeps its trials.

    Attributes:
        settings: of the search.
        space: what is searched over.
        runs, base, stage: where the runs are, how their names begin, the stage that is trained.
        folder: with the file of the trials, and their logs.
        fixed: the other settings that a trial depends on: with other ones there, its value would be no comparison.
    """

    settings: SearchSettings
    space: Mapping[str, Dimension]
    runs: Path
    base: str
    stage: str
    folder: Path
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def run_of(self, number: int) -> str:
        """The name of a trial's run."""
        return f"{self.base}-trial{number}"

    def trials(self) -> list[Trial]:
        """All that are known, by number.

        Raises:
            UserError: one was trained with other settings, or a file is damaged.
        """
        found = {trial.number: trial for trial in self._begun()}
        for trial in found.values():
            if trial.params.keys() != self.space.keys():
                raise UserError(
                    f"{self.folder}: its trials searched {', '.join(trial.params)}, not {', '.join(self.space)}.",
                    "Search the same keys, or begin another search with run=NEW.",
                )
        for entry in newest(read_ledger(self.runs)):
            match = re.fullmatch(rf"{re.escape(self.base)}-trial(\d+)", entry.run)
            if match is None or entry.stage != self.stage:
                continue
            number = int(match[1])
            # Which file of a group was chosen is not among the settings: the file of the trials knows it.
            known = (found[number].params if number in found else {}) | entry.settings
            if not self.space.keys() <= known.keys():
                continue
            self._require_comparable(entry.run, entry.settings)
            params = {key: known[key] for key in self.space}
            value = entry.metrics.get(self.settings.metric)
            states: dict[str, State] = {
                "finished": "finished",
                "failed": "failed",
                "stopped": "running",
                "started": "running",
            }
            state = states[entry.exit]
            if state != "finished" and number in found and found[number].state in ("pruned", "failed"):
                continue  # it was stopped for that, or before it failed
            if state == "finished" and value is None:
                raise UserError(
                    f"search.metric={self.settings.metric}: the run {entry.run} has not measured it.",
                    f"It has {', '.join(sorted(entry.metrics))}.",
                )
            found[number] = Trial(number, params, state, value if state == "finished" else None)
        return [found[number] for number in sorted(found)]

    def keep(self, trial: Trial) -> None:
        """Note a trial in the file; whoever calls holds the lock of the folder."""
        others = [each for each in self._begun() if each.number != trial.number]
        kept = sorted([*others, trial], key=lambda each: each.number)
        write_json(self.folder / "trials.json", {"trials": [to_plain(each) for each in kept]})

    def _begun(self) -> list[Trial]:
        path = self.folder / "trials.json"
        if not path.exists():
            return []
        fix = "Delete it: what is finished stands in the ledger."
        rows = read_object(path, fix).get("trials", [])
        return [build_known(Trial, row, str(path)) for row in rows]

    def _require_comparable(self, run: str, settings: Mapping[str, Any]) -> None:
        differ = [key for key, value in self.fixed.items() if key in settings and settings[key] != value]
        if differ:
            shown = [f"{key}={self.fixed[key]}: the trial {run} had {key}={settings[key]}." for key in differ]
            raise UserError(shown, "Leave these keys as they were, or begin another search with run=NEW.")

    def lock_of(self, number: int) -> Path:
        """The file that whoever trains a trial holds a lock of."""
        return self.folder / f"trial{number}.lock"

    def abandoned(self, trials: Sequence[Trial]) -> Trial | None:
        """A trial that was begun, and that nobody is at."""
        for trial in trials:
            if trial.state == "running":
                with self.lock_of(trial.number).open("a", encoding="utf-8") as file:
                    if try_lock(file):
                        return trial
        return None

    def ask(self, trials: Sequence[Trial], params: Mapping[str, Any] | None = None) -> Any:
        """Optuna's trial that is next, of a study that has been told of all others.

        Args:
            trials: what is known.
            params: its values, of one that goes on; None: Optuna chooses them.

        Raises:
            UserError: Optuna is not installed.
        """
        try:
            import optuna
        except ImportError as error:
            raise UserError("search: needs Optuna.", "pip install 'nanochat-pl[optuna]'") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        own, seed = self.settings, self.settings.seed + len(trials)
        samplers: dict[str, Callable[[], Any]] = {
            "tpe": lambda: optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=own.random_trials, constant_liar=True
            ),
            "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        }
        pruner = optuna.pruners.MedianPruner(n_startup_trials=own.prune_after)
        study = optuna.create_study(direction=own.direction, sampler=samplers[own.sampler](), pruner=pruner)
        distributions = {key: _distribution(optuna, dimension) for key, dimension in self.space.items()}
        for trial in trials:
            if params is not None and trial.params == params and trial.state == "running":
                continue  # it is the one that goes on
            if all(_contains(distributions[key], value) for key, value in trial.params.items()):
                study.add_trial(_frozen(optuna, trial, distributions, self.measured(trial.number)))
        if params is not None:
            study.enqueue_trial(dict(params))
        return study.ask(distributions)

    def measured(self, number: int) -> dict[int, float]:
        """The metric by step as far as a trial has come, without the weights that it began with; empty: none is there.

        What is read may be half a line: then it is what was measured before.
        """
        if not self.settings.is_measured_on_the_way:
            return {}
        path = stage_folder(self.runs, self.run_of(number), self.stage).path
        try:
            series = read_stage(path).column(self.settings.metric)
        except UserError:
            return {}
        return {step: value for step, value in zip(series.steps, series.values, strict=True) if step > 0}


def best_of(trials: Sequence[Trial], direction: str) -> Trial | None:
    """The finished trial with the best value."""
    finished = [trial for trial in trials if trial.state == "finished" and trial.value is not None]
    sign = 1 if direction == "minimize" else -1
    return min(finished, key=lambda trial: sign * (trial.value or 0.0), default=None)


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    kinds = optuna.distributions
    if isinstance(dimension, Choice):
        return kinds.CategoricalDistribution(dimension.values)
    if dimension.is_whole:
        step = 1 if dimension.step is None else int(dimension.step)
        return kinds.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.is_log, step=step)
    return kinds.FloatDistribution(dimension.low, dimension.high, log=dimension.is_log, step=dimension.step)


def _contains(distribution: Any, value: Any) -> bool:
    """Whether a value is one that is searched over now: the space of an earlier start may have been wider."""
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except (TypeError, ValueError):
        return False


def _frozen(optuna: Any, trial: Trial, distributions: Mapping[str, Any], measured: Mapping[int, float]) -> Any:
    states = optuna.trial.TrialState
    state = {"finished": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL, "running": states.RUNNING}
    finite = {step: value for step, value in measured.items() if math.isfinite(value)}
    return optuna.trial.create_trial(
        state=state[trial.state],
        value=trial.value if trial.state in ("finished", "pruned") else None,
        params=dict(trial.params),
        distributions=dict(distributions),
        intermediate_values=finite,
    )


def ended(trial: Trial, state: State, value: float | None) -> Trial:
    """A trial, with what has come of it."""
    return dataclasses.replace(trial, state=state, value=value)
