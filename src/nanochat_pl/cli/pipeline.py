"""Runs the steps that an experiment names, each in a process of its own; finished ones are skipped.

    nanochat-pl pipeline experiment=demo
    nanochat-pl pipeline experiment=demo run=mine model.depth=6 stages.base.max_steps=500

A key goes to every step that has it, stages.STEP.KEY to one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from nanochat_pl.cli._subprocess import run_child
from nanochat_pl.cli.evaluate_settings import EvaluateConfig
from nanochat_pl.cli.report import ReportConfig
from nanochat_pl.cli.train import how_to_go_on, place_of, require_paths, with_parent
from nanochat_pl.cli.train import is_finished as is_trained
from nanochat_pl.common.console import ignore_broken_pipe, next_steps, print_table, rank_zero_print
from nanochat_pl.common.constants import EXIT_USER_ERROR
from nanochat_pl.common.errors import UserError, did_you_mean
from nanochat_pl.common.imports import loading_libraries
from nanochat_pl.common.paths import PathsSettings, run_keys
from nanochat_pl.common.run_dir import fresh_run
from nanochat_pl.common.schema import setting
from nanochat_pl.config import config_dir
from nanochat_pl.config.compose import Composed, key_of
from nanochat_pl.config.experiment import COMMANDS, compose_step, pipeline_of
from nanochat_pl.config.overrides import problems_of_form, split_override, take_key
from nanochat_pl.config.stage_choice import name_of_stage
from nanochat_pl.training.config import TrainConfig
from nanochat_pl.training.stages.registry import parents_of


@dataclass(frozen=True)
class PipelineConfig:
    """What ``--help`` shows: the keys that all steps share."""

    run: str | None = setting(None, "Name of the run; null: the experiment's.")
    paths: PathsSettings = setting(factory=PathsSettings)


Config = PipelineConfig
EXTRA_KEYS = {"experiment=NAME": "A file of conf_experiments, or the path of one of your own (…/mine.yaml)."}


@dataclass(frozen=True)
class Step:
    """One step of a pipeline: a training stage, or a command that reads what these left.

    Attributes:
        own: keys of the command line that are for this step alone, without ``stages.STEP.``.
    """

    name: str
    command: str
    schema: type
    overrides: tuple[str, ...]
    own: frozenset[str] = frozenset()

    def compose(self) -> Composed:
        """Its settings. Raises :class:`UserError` with the keys as they were typed."""
        try:
            return compose_step(self.command, self.name, self.schema, self.overrides)
        except UserError as error:
            raise UserError([self._as_typed(line) for line in error.problems], error.fix) from error

    def _as_typed(self, problem: str) -> str:
        key = key_of(problem)
        if not any(key == each or key.startswith(f"{each}.") for each in self.own):
            return problem
        deletes = "~" if key.startswith("~") else ""
        return f"{deletes}stages.{self.name}.{problem.removeprefix('~')}"


@ignore_broken_pipe()
def run(arguments: Sequence[str]) -> int:
    """The command."""
    steps = steps_of(arguments)
    composed = check_all(steps)
    if any(getattr(c.config, "check_only", False) for c in composed):
        return _check(steps, composed)
    require_paths([each for each in composed if isinstance(each.config, TrainConfig)])
    run_dir = folder_to_run_in(composed)
    resume = "never" if begins_anew(composed) else "auto"
    if resume == "never":
        rank_zero_print(f"New run: {run_dir.name}.")
        steps = steps_of(_in_run(run_dir.name, arguments))
        composed = check_all(steps)
    for step, checked in zip(steps, composed, strict=True):
        if is_finished(step, checked, run_dir):
            rank_zero_print(f"{step.name}: finished before.")
            continue
        rank_zero_print(f"{step.name}:", style="bold")
        code = run_child([step.command, *step.overrides])
        if code:
            again = "" if code == EXIT_USER_ERROR else f" {how_to_go_on(run_dir.name, resume)}"
            rank_zero_print(f"{step.name}: ended with exit code {code}.{again}")
            return code
    finish(run_dir)
    return 0


def _check(steps: Sequence[Step], composed: Sequence[Composed]) -> int:
    """Show what is known of each step before anything is trained: nothing of the run need be there."""
    before: list[str] = []
    for step, checked in zip(steps, composed, strict=True):
        rank_zero_print(f"{step.name}:", style="bold")
        if step.command != "train":
            rank_zero_print("The settings are right. What it reads is left by the stages.")
            continue
        # Of the run, a stage takes the last possible parent that is finished: here it is the one that will be.
        stage = checked.config.stage
        possible = [name for name in parents_of(stage.definition) if name in before]
        parent = [f"stage.parent={possible[-1]}"] if possible and stage.parent is None else []
        if code := run_child([step.command, *step.overrides, *parent, "check_only=true"]):
            return code
        before.append(step.name)
    return 0


def steps_of(arguments: Sequence[str]) -> list[Step]:
    """The experiment's steps, each with its share of the command line.

    Raises:
        UserError: no experiment, or keys that no step has.
    """
    name, rest = take_key(arguments, "experiment")
    if not name:
        known = ", ".join(config_dir.experiments())
        raise UserError("experiment: is missing.", f"Name one: nanochat-pl pipeline experiment=NAME ({known}).")
    names = pipeline_of(name)
    if not names:
        path = config_dir.experiment_file(name)
        raise UserError(f"{path}: pipeline: names no steps.", "Write for instance pipeline: [tokenizer, base].")
    steps = [_step(name, step, rest) for step in names]
    _require_takers(rest, steps)
    return steps


def check_all(steps: Sequence[Step]) -> list[Composed]:
    """Compose every step before the first begins: a typo in the last one is found now and not in an hour."""
    problems: dict[str, None] = {}
    composed = []
    for step in steps:
        try:
            composed.append(step.compose())
        except UserError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise UserError(list(problems), "Keys and their meaning: nanochat-pl pipeline --help, nanochat-pl train --help")
    return composed


def run_folder_of(composed: Sequence[Composed]) -> Path:
    """The run's folder, which must be the same for all steps."""
    folders = {Path(c.config.paths.runs) / (c.config.run or c.experiment) for c in composed}
    if len(folders) > 1:
        raise UserError(f"run, paths.runs: differ between the steps: {', '.join(map(str, sorted(folders)))}.")
    return folders.pop()


def begins_anew(composed: Sequence[Composed]) -> bool:
    """Whether a new run was asked for, resume=never."""
    return any(getattr(each.config, "resume", "") == "never" for each in composed)


def folder_to_run_in(composed: Sequence[Composed]) -> Path:
    """The folder of the run that is trained now: with resume=never that of a new one."""
    run_dir = run_folder_of(composed)
    return run_dir.with_name(fresh_run(run_dir.parent, run_dir.name)) if begins_anew(composed) else run_dir


def is_finished(step: Step, composed: Composed, run_dir: Path) -> bool:
    """Whether a step's result is there. Evaluation and report are made again when what they read is newer."""
    if step.command == "train":
        folder = place_of(composed)
        return is_trained(folder, with_parent(composed, folder))
    if step.command == "evaluate":
        with loading_libraries():  # torch, which the settings are checked without
            from nanochat_pl.cli._evaluate import is_measured
        return is_measured(composed)
    report = run_dir / "report" / "report.json"
    read = [path for pattern in ("*/finished.json", "evaluation/*/results.json") for path in run_dir.glob(pattern)]
    return report.is_file() and all(path.stat().st_mtime_ns <= report.stat().st_mtime_ns for path in read)


def finish(run_dir: Path) -> None:
    """Print the metrics and what can be done with the run now."""
    from nanochat_pl.report import SUMMARY_COLUMNS, summary_table

    rank_zero_print()
    print_table(SUMMARY_COLUMNS, summary_table(run_dir), title=f"run {run_dir.name}: all steps are finished")
    rank_zero_print()
    report = run_dir / "report" / "report.html"
    run = run_keys(run_dir.name, run_dir.parent)
    next_steps(
        [
            *([("read the report", str(report))] if report.is_file() else []),
            ("talk to it", f"nanochat-pl chat {run}"),
            ("talk to it on a page", f"nanochat-pl serve {run}"),
            ("look at the curves", f"tensorboard --logdir {run_dir}"),
            ("write the report again", f"nanochat-pl report {run}"),
        ]
    )


def _in_run(name: str, overrides: Sequence[str]) -> list[str]:
    """The command line with all steps in one run: resume=never means one new run, and not one for each stage."""
    rest = [text for text in overrides if split_override(text)[0].rpartition(".")[2] not in ("run", "resume")]
    return [*rest, f"run={name}", "resume=auto"]


def _step(experiment: str, name: str, overrides: Sequence[str]) -> Step:
    command = name if name in COMMANDS else "train"
    schema: type = {"train": TrainConfig, "evaluate": EvaluateConfig, "report": ReportConfig}[command]
    taken = [text.lstrip("+") for text in overrides]
    prefix = f"stages.{name_of_stage(name)}."
    shared = [text for text in taken if not text.startswith(("stages.", "~stages.")) and _has(schema, text)]
    own = [text.removeprefix(prefix) for text in taken if text.startswith(prefix)]
    own += [f"~{text.removeprefix(f'~{prefix}')}" for text in taken if text.startswith(f"~{prefix}")]
    stage = [f"stage={name}"] if command == "train" else []
    keys = frozenset(split_override(text)[0] for text in own)
    return Step(name_of_stage(name), command, schema, (f"experiment={experiment}", *stage, *shared, *own), keys)


def _has(schema: type, text: str) -> bool:
    return split_override(text)[0].removeprefix("~").split(".")[0] in {field.name for field in fields(schema)}


def _require_takers(overrides: Sequence[str], steps: Sequence[Step]) -> None:
    problems = problems_of_form(overrides, *(step.schema for step in steps))
    for text in overrides:
        key, _, problem = split_override(text)
        if problem:
            continue
        key = key.removeprefix("~")
        if key.split(".")[0] == "stage":
            problems.append(
                f"{text}: a pipeline has its stages from the experiment; stages.STEP.KEY=… sets a key of one."
            )
        elif key.startswith("stages."):
            named, step = [step.name for step in steps], key.split(".")[1]
            if key.count(".") < 2:
                problems.append(f"{text}: is not of the form stages.STEP.KEY=…; the steps are {', '.join(named)}.")
            elif step not in named:
                problems.append(f"stages.{step}: is no step of the pipeline; {did_you_mean(step, named)}")
        elif not any(_has(step.schema, text) for step in steps):
            problems.append(f"{key}: no step of the pipeline has such a key.")
    if problems:
        raise UserError(problems, "Keys and their meaning: nanochat-pl pipeline --help, nanochat-pl train --help")
