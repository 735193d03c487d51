"""Which runs of the ledger a command means: names, globs, and settings that they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanochat_pl.cli._sweep_state import runs_of_same_sweep
from nanochat_pl.cli.run_record import settings_that_matter
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.paths import PathsSettings
from nanochat_pl.common.schema import setting
from nanochat_pl.comparison import Comparison, Run, compare, keep, neighbours, read_runs
from nanochat_pl.comparison.metrics import main_metrics
from nanochat_pl.config.overrides import UNKNOWN, is_group, parse_overrides, split_override, type_of_key
from nanochat_pl.ledger import LEDGER, newest, read_ledger
from nanochat_pl.report.evaluations import evaluated_metrics
from nanochat_pl.training.config import TrainConfig

# Of group `evaluation` what is measured, and not when: with others, a metric of the same name is another one.
_NOT_MEASURED = ("every_steps", "at_start", "sandbox", "samples_every_steps", "sample_prompts", "sample_tokens")


@dataclass(frozen=True)
class ChoiceSettings:
    """Which runs; the keys that `compare` and `scaling` have in common."""

    runs: list[str] = setting(
        factory=list, doc="Names of runs, or globs as 'd4-*'; words on the command line are the same; none: all runs."
    )
    settings: list[str] = setting(
        factory=list, doc="KEY=VALUE of settings that the runs have; a key of train on the command line is the same."
    )
    stage: str | None = setting(None, "Their stage; null: the last one that such a run has finished.")
    paths: PathsSettings = setting(factory=PathsSettings)


def overrides_of(arguments: Sequence[str], schema: type) -> list[str]:
    """A command line with its words as ``runs=[…]`` and its settings of trainings as ``settings=[…]``."""
    words: list[str] = []
    wanted: list[str] = []
    rest: list[str] = []
    for argument in arguments:
        key = split_override(argument)[0]
        if "=" not in argument and not argument.startswith(("-", "+", "~")):
            words.append(argument)
        elif _is_of(TrainConfig, key) and not _is_of(schema, key):  # a wrong one is told among the runs' own
            wanted.append(argument.lstrip("+"))
        else:
            rest.append(argument)
    for key, values in (("runs", words), ("settings", wanted)):
        if values and any(split_override(argument)[0] == key for argument in rest):
            raise UserError(f"{key}: is given twice, with {key}= and by {values[0]}.", "Write all of them in one way.")
        if values:
            rest.append(f"{key}=[{','.join(map(_quoted, values))}]")
    return rest


def choose(config: ChoiceSettings, metrics: Sequence[str]) -> tuple[str, list[Run], list[str]]:
    """The stage, its finished runs in the order of the ledger, and remarks.

    Args:
        metrics: what is wanted of them: what `evaluate` has found lies beside the runs, not in the ledger.

    Raises:
        UserError: there is none, or a name or a setting fits none.
    """
    folder = Path(config.paths.runs)
    entries = read_ledger(folder)
    if not entries:
        raise UserError(
            f"{folder / LEDGER}: has no entries yet: a run is noted when a stage of it ends.",
            "Train one: nanochat-pl train …; or give the folder of the runs, paths.runs=…",
        )
    stage, runs, remarks = read_runs(entries, config.stage, settings_of_results, config.runs)
    runs = keep(runs, _wanted(config.settings))
    if any(metric.startswith("evaluate/") for metric in metrics):
        runs = [
            replace(run, metrics=run.metrics | evaluated_metrics(folder / run.name / "evaluation" / stage))
            for run in runs
        ]
    return stage, runs, remarks


def comparisons_of(folder: Path, name: str) -> list[Comparison]:
    """Each finished stage of a run beside its other seeds and the runs that differ from it in a few settings.

    Empty where the ledger has nothing to compare it with.

    Args:
        folder: of the runs.
        name: of the run.
    """
    entries, related = read_ledger(folder), runs_of_same_sweep(folder, name)
    found = []
    for stage in (entry.stage for entry in newest(entries) if entry.run == name and entry.exit == "finished"):
        _, runs, _ = read_runs(entries, stage, settings_of_results)
        own = next(run for run in runs if run.name == name)
        chosen = neighbours(own, runs, related)
        metrics = main_metrics(own.metrics)
        if chosen.groups and metrics:
            result = compare(stage, chosen.groups, metrics)
            found.append(replace(result, remarks=[*chosen.remarks, *result.remarks]))
    return found


def settings_of_results(settings: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Of all settings those that a stage's metrics depend on: what is learnt, and on what it is measured."""
    measured = {
        key: value
        for key, value in settings.items()
        if (parts := key.split("."))[0] == "evaluation"
        and parts[1] not in _NOT_MEASURED
        and not parts[1].endswith("every_steps")
    }
    return settings_that_matter(settings, stage) | measured


def _wanted(settings: Sequence[str]) -> dict[str, Any]:
    """The settings that are asked for, with values as the command line of train has them."""
    problems: list[str] = []
    found = {each.key: each.value for each in parse_overrides(settings, TrainConfig, {}, problems)}
    problems += [
        f"{key}={value}: is a group of settings."
        for key, value in found.items()
        if is_group(type_of_key(TrainConfig, key))
    ]
    if problems:
        raise UserError([f"settings: {problem}" for problem in problems], "Name settings as for train: model.depth=4")
    return found


def _is_of(schema: type, key: str) -> bool:
    return type_of_key(schema, key.split(".")[0]) is not UNKNOWN


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
