"""Which runs of the ledger a command means: names, globs, and settings that they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from nanochat_pl.cli._sweep_state import runs_of_same_sweep
from nanochat_pl.cli.run_record import settings_that_matter
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.paths import PathsSettings
from nanochat_pl.common.schema import setting
from nanochat_pl.comparison import Comparison, Run, compare, neighbours, read_runs
from nanochat_pl.comparison.metrics import main_metrics
from nanochat_pl.config.compose import compose
from nanochat_pl.config.overrides import UNKNOWN, split_override, type_of_key
from nanochat_pl.ledger import LEDGER, newest, read_ledger
from nanochat_pl.ledger.query import condition_name
from nanochat_pl.report.evaluations import evaluated_metrics
from nanochat_pl.training.config import TrainConfig
from nanochat_pl.training.stages.registry import REGISTRY

# Of group `evaluation` what is measured, and not when: with others, a metric of the same name is another one.
_NOT_MEASURED = ("every_steps", "at_start", "sandbox", "samples_every_steps", "sample_prompts", "sample_tokens")


@dataclass(frozen=True)
class ChoiceSettings:
    """Which runs; the keys that `compare` and `scaling` have in common."""

    runs: list[str] = setting(
        factory=list, doc="Names of runs, or globs as 'd4-*'; words on the command line are the same; none: all runs."
    )
    where: str | None = setting(
        None,
        "Those of which this is so, as for `runs`: NAME OPERATOR VALUE, several joined by and; a key of train on the"
        " command line, model.depth=2,4, is such a condition.",
    )
    stage: str | None = setting(
        None, "Their stage; null: the last one that such a run has finished; of compare by=KEY, in which KEY differs."
    )
    paths: PathsSettings = setting(factory=PathsSettings)


Config = TypeVar("Config", bound=ChoiceSettings)


def overrides_of(arguments: Sequence[str], schema: type) -> list[str]:
    """A command line with its words as ``runs=[…]``, and what it says of settings of trainings in ``where=``."""
    words: list[str] = []
    wanted: list[str] = []
    rest: list[str] = []
    for argument in arguments:
        key = split_override(argument)[0]
        name = condition_name(argument.lstrip("+"))
        if key == "where":
            wanted.append(split_override(argument)[1])
        elif name is not None and _is_of(TrainConfig, name) and not _is_of(schema, name):
            wanted.append(argument.lstrip("+"))  # a wrong one is told among the runs' own
        elif "=" not in argument and not argument.startswith(("-", "+", "~")):
            words.append(argument)
        else:
            rest.append(argument)
    if words and any(split_override(argument)[0] == "runs" for argument in rest):
        raise UserError(f"runs: is given twice, with runs= and by {words[0]}.", "Write all of them in one way.")
    if words:
        rest.append(f"runs=[{','.join(map(_quoted, words))}]")
    return [*rest, f"where={' and '.join(wanted)}"] if wanted else rest


def choose(
    command: str,
    schema: type[Config],
    arguments: Sequence[str],
    metrics_of: Callable[[Config], Sequence[str]],
    by_of: Callable[[Config], str | None] = lambda config: None,
) -> tuple[Config, str, list[Run], list[str]]:
    """What a command that reads the ledger begins with.

    Args:
        command: its name.
        schema: of its settings.
        arguments: the command line.
        metrics_of: what is wanted of the runs: what `evaluate` has found lies beside them, not in the ledger.
        by_of: the setting whose values are compared; None: no one in particular.

    Returns:
        the settings, the stage, its finished runs in the order of the ledger, and remarks.

    Raises:
        UserError: there is none, or a name or a condition fits none.
    """
    config = compose(command, schema, overrides_of(arguments, schema)).config
    folder = Path(config.paths.runs)
    entries = read_ledger(folder)
    if not entries:
        raise UserError(
            f"{folder / LEDGER}: has no entries yet: a run is noted when a stage of it ends.",
            "Train one: nanochat-pl train …; or give the folder of the runs, paths.runs=…",
        )
    stage, runs, remarks = read_runs(
        entries, config.stage, settings_of_results, config.runs, config.where, by_of(config)
    )
    if any(metric.startswith("evaluate/") for metric in metrics_of(config)):
        runs = [
            replace(run, metrics=run.metrics | evaluated_metrics(folder / run.name / "evaluation" / stage))
            for run in runs
        ]
    return config, stage, runs, remarks


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
    """Of all settings those that a stage's metrics depend on: what is learnt, and on what it is measured.

    Of a stage whose class is not known here, all.
    """
    if stage not in REGISTRY.load():
        return dict(settings)
    measured = {
        key: value
        for key, value in settings.items()
        if (parts := key.split("."))[0] == "evaluation"
        and parts[1] not in _NOT_MEASURED
        and not parts[1].endswith("every_steps")
    }
    return settings_that_matter(settings, stage) | measured


def _is_of(schema: type, key: str) -> bool:
    return type_of_key(schema, key.split(".")[0]) is not UNKNOWN


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
