"""Trains one stage of a run; the same command again resumes it.

nanochat-pl train stage=base model.depth=4 max_steps=200
nanochat-pl train stage=mid run=d4
nanochat-pl train stage=sft run=d4
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat_pl.cli._subprocess import is_child
from nanochat_pl.cli.launch import launch, processes_to_start
from nanochat_pl.cli.run_record import (
    as_typed,
    reopen,
    require_same_settings,
    restored_on_refusal,
    settings_of,
    settings_that_matter,
    trains_longer,
    what_runs,
    write_records,
)
from nanochat_pl.common.console import ignore_broken_pipe, next_steps, print_table, rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import entries, sha256_of_file
from nanochat_pl.common.imports import loading_libraries, no_garbage_collection
from nanochat_pl.common.paths import cache_folder, run_keys
from nanochat_pl.common.run_dir import SHARED_RUNS, StageFolder, fresh_stage_folder, only_run_with, stage_folder
from nanochat_pl.config.compose import Composed
from nanochat_pl.config.experiment import compose_step
from nanochat_pl.config.instantiate import make_objects, module_class
from nanochat_pl.config.overrides import take_key
from nanochat_pl.data.files.folder import require_there
from nanochat_pl.distributed import coordination
from nanochat_pl.planning import Plan, width_remark
from nanochat_pl.training.config import TrainConfig
from nanochat_pl.training.stage_data.inherit import inherited, parent_name
from nanochat_pl.training.stages.registry import StageData, all_stages, stage_named

if TYPE_CHECKING:
    from nanochat_pl.cli._ledger import EndOfStage

Config = TrainConfig
# Keys of files that a stage reads, by their last part.
_PATHS = ("path", "validation_path", "test_path", "words_path")
# What --help shows first, besides the keys at the root.
HELP_KEYS = ("model.depth", "model.sequence_len", "data.path", "trainer.accelerator", "paths.runs")
EXTRA_KEYS = {
    **{f"stage={name}": stage.help for name, stage in all_stages().items()},
    "stage=module.Class": "A stage of your own, of any package or of a file in the current folder.",
    "experiment=NAME": "Take the settings of an experiment file (its shared keys and those of the stage).",
    "-m": "Several values for a key, model.depth=2,4: one job for each, finished ones are skipped.",
}


@ignore_broken_pipe()
def run(arguments: Sequence[str]) -> int:
    """The command."""
    composed = coordination.raise_on_all_ranks(lambda: compose_train(arguments))
    if not composed.config.check_only:
        coordination.raise_on_all_ranks(lambda: require_paths([composed]))
    with loading_libraries():
        from nanochat_pl.cli._ledger import EndOfStage
    if (num_processes := coordination.raise_on_all_ranks(lambda: _processes_to_start(composed))) > 1:
        return launch(["train", *arguments], num_processes)
    require_same_code_everywhere()
    require_same_settings_everywhere(composed)
    config = composed.config
    _say_unused(composed)
    place = coordination.run_on_rank_zero(lambda: _names(place_of(composed)))
    folder = StageFolder(Path(config.paths.runs), **place)
    composed = with_parent(composed, folder)
    config = composed.config
    if config.check_only:
        coordination.run_on_rank_zero(lambda: _print_check(composed, folder))
        return 0
    # The main process looks: what others see of the disk may be older.
    if coordination.run_on_rank_zero(lambda: folder.status != "finished" or trains_longer(folder, composed)):
        # Before the folder is made: a stage whose parent is not there leaves nothing behind.
        inherits = coordination.raise_on_all_ranks(lambda: inherited(config, folder, composed.given))
        composed = dataclasses.replace(composed, config=inherits)
        require_same_parent_everywhere(composed)
    with EndOfStage(composed, folder) as end, contextlib.ExitStack() as held:
        if not coordination.run_on_rank_zero(lambda: _opened(folder, composed, held)):
            return 0
        end.begin()
        code = _train(composed, folder, end)
    if code == 0 and not is_child():
        next_steps(_next_commands(folder))
    return code


def _processes_to_start(composed: Composed[TrainConfig]) -> int:
    """How many processes are to be started for the training; 1: this one does it, or there is nothing to train."""
    config = composed.config
    if not config.stage.definition.has_model:
        return 1
    trainer = config.trainer
    number = processes_to_start(trainer.accelerator, trainer.devices, trainer.num_nodes, "trainer.")
    if number == 1 or config.check_only:
        return 1
    folder = place_of(composed, tell=lambda text: None)
    finished = folder.status == "finished" and not trains_longer(folder, with_parent(composed, folder))
    return 1 if finished else number


def _say_unused(composed: Composed[TrainConfig]) -> None:
    """Say which keys of the command line are of another stage. The steps of a pipeline are given the same ones."""
    stage = composed.config.stage
    for prefixes, whose in stage.definition.unused_keys().items():
        unused = [text for text in composed.overrides if text.lstrip("+").startswith(prefixes)]
        if unused and not is_child():
            rank_zero_print(f"{' '.join(unused)}: is for {whose}, and does nothing in stage={stage.name}.")


def _opened(folder: StageFolder, composed: Composed[TrainConfig], held: contextlib.ExitStack) -> bool:
    """Make a stage's folder, lock it and write down what is done in it; False where it is finished."""
    folder.create()
    held.enter_context(folder.locked())  # first of all: another process may have been at it, and just ended
    if _begun(folder):
        held.enter_context(restored_on_refusal(folder))
    if trains_longer(folder, composed):
        reopen(folder, composed)
    if is_finished(folder, composed):
        rank_zero_print(f"{folder.path}: is finished. resume=never trains a new one.")
        return False
    # A start that is refused leaves nothing behind; one that has a resume file stays.
    if not _begun(folder):
        held.enter_context(folder.undone_on_error())
    write_records(folder, composed, resuming=_begun(folder))
    return True


def _names(folder: StageFolder) -> dict[str, str]:
    return {"run": folder.run, "stage": folder.stage, "parent_run": folder.parent_run}


def require_same_settings_everywhere(composed: Composed[Any]) -> None:
    """Refuse processes of one launch that were given different settings."""

    def problem(mains: str) -> str:
        theirs, own = json.loads(mains)["typed"], composed.overrides
        typed = f"{' '.join(own)}; the main process: {' '.join(theirs)}" if own != tuple(theirs) else "the same command"
        return f"has other settings than the main process: {typed}."

    settings = json.dumps({"typed": composed.overrides, "all": composed.plain()}, default=str)
    coordination.assert_equal_across_ranks(settings, problem, "Start all processes with the same command.")


def require_same_code_everywhere() -> None:
    """Refuse processes of one launch that run different code, or different versions of the libraries."""
    from nanochat_pl.distributed import collectives  # with torch

    if collectives.world_size() == 1:
        return
    own = what_runs()

    def problem(mains: str) -> str:
        theirs = json.loads(mains)
        differ = [f"{name} {own[name]} (the main process: {theirs[name]})" for name in own if own[name] != theirs[name]]
        return f"{socket.gethostname()} runs {', '.join(differ)}."

    coordination.assert_equal_across_ranks(json.dumps(own), problem, "Install the same on all nodes.")


def require_same_parent_everywhere(composed: Composed[TrainConfig]) -> None:
    """Refuse processes of one launch that see another parent, or none."""

    def problem(mains: str) -> str:
        return f"{socket.gethostname()} inherits other settings than the main process: it sees another folder of runs."

    coordination.assert_equal_across_ranks(json.dumps(composed.plain(), default=str), problem, SHARED_RUNS)


def is_finished(folder: StageFolder, composed: Composed[TrainConfig]) -> bool:
    """Whether a stage is done. Raises :class:`UserError` where it was begun under other settings."""
    if _begun(folder):
        require_same_settings(folder, composed)
    return folder.status == "finished"


def _begun(folder: StageFolder) -> bool:
    """Whether there is something to go on with; a run that was killed before its first resume file starts over."""
    # Damaged ones count: what they were part of is not to be begun anew without a word.
    names = [path.name for path in entries(folder.checkpoints)]
    return folder.status == "finished" or any(name.endswith((".ckpt", ".ckpt.damaged")) for name in names)


def with_parent(composed: Composed[TrainConfig], folder: StageFolder) -> Composed[TrainConfig]:
    """The settings with the stage's parent named: where they leave it open, that with which the stage was begun."""
    stage = composed.config.stage
    if stage.parent is not None or not stage.definition.starts_from_model:
        return composed

    def look() -> str | None:
        begun = settings_of(folder).get("stage", {}) if _begun(folder) else {}
        return begun.get("parent") or parent_name(composed.config, folder)

    named = dataclasses.replace(stage, parent=coordination.run_on_rank_zero(look))
    return dataclasses.replace(composed, config=dataclasses.replace(composed.config, stage=named))


def _require_begun_with(composed: Composed[TrainConfig], folder: StageFolder) -> None:
    """Refuse what a stage that has begun would not go on with."""
    if not _begun(folder):
        return
    longer = trains_longer(folder, composed)
    if folder.status != "finished" or longer:
        composed = dataclasses.replace(composed, config=inherited(composed.config, folder, composed.given))
    require_same_settings(folder, composed, reopens=longer)


def _print_check(composed: Composed[TrainConfig], folder: StageFolder) -> None:
    """What is known before anything is trained: of base its plan; a later stage's follows from its parent."""
    _require_begun_with(composed, folder)
    stage, parent = folder.stage, parent_name(composed.config, folder)
    from_scratch = composed.config.stage.definition.from_scratch
    if from_scratch:
        from nanochat_pl.cli._full_plan import print_plan  # with torch

        print_plan(composed.config)
    else:
        settings = settings_that_matter(composed.plain(), stage)
        rows = [(key, as_typed(value)) for key, value in settings.items() if value is not None]
        print_table(("setting", "value"), rows, title=f"The stage {stage} in {folder.path}")
    if not from_scratch and parent is not None:
        start = folder.parent(parent)
        there = "is finished" if start.status == "finished" else "is not finished yet"
        rank_zero_print(f"Model, tokenizer and all that is null come from {start.path}, which {there}.")
    rank_zero_print("check_only=true: the settings are right; nothing was trained.")


def compose_train(overrides: Sequence[str]) -> Composed[TrainConfig]:
    """The settings of a stage: group files, then the experiment's sections for that stage, then the command line."""
    stage, _ = take_key(overrides, "stage")
    return compose_step("train", stage or "base", TrainConfig, overrides)


def place_of(composed: Composed[TrainConfig], tell: Callable[[str], None] = rank_zero_print) -> StageFolder:
    """The folder of the stage: of the run that is named, else of the experiment's, else of the depth's.

    A stage that builds on a trained one takes the only run that has it. ``tell``: says which run was chosen.
    """
    config = composed.config
    runs = Path(config.paths.runs)
    name = config.run or composed.experiment
    if not name and config.stage.definition.starts_from_model:
        parent = config.stage.parent or config.stage.definition.parents[0]
        name = only_run_with(runs, parent)
        tell(f"run={name}: the only run with a finished stage {parent}.")
    name = name or f"d{config.model.depth}"
    if config.resume == "never":
        folder = fresh_stage_folder(runs, name, config.stage.name)
        if not (runs / folder.run).exists():
            tell(f"New run: {folder.run}.")
        return folder
    return stage_folder(runs, name, config.stage.name)


def require_paths(stages: Sequence[Composed[TrainConfig]]) -> None:
    """Refuse files on disk that stages would train on and that are not there or hold nothing. Nothing is fetched.

    It takes no time, so it comes before the device is chosen and the compiler tried. Finished stages read none.

    Raises:
        UserError: with the problems of all stages together.
    """
    problems: dict[str, None] = {}
    for composed in stages:
        if place_of(composed, tell=lambda text: None).status == "finished":
            continue
        for key, value in settings_that_matter(composed.plain(), composed.config.stage.name).items():
            if key.rpartition(".")[2] in _PATHS and isinstance(value, str):
                try:
                    require_there(key, value)
                except UserError as error:
                    problems |= dict.fromkeys(error.problems)
    if problems:
        raise UserError(list(problems))


def _train(composed: Composed[TrainConfig], folder: StageFolder, end: EndOfStage) -> int:
    with no_garbage_collection():
        from nanochat_pl.training.callbacks.graceful_stop import StopRequested
        from nanochat_pl.training.run import train_stage

    def on_prepared(data: StageData) -> None:
        end.prepared(data)
        _say_plan(data.plan)

    config = composed.config
    try:
        train_stage(
            config,
            folder,
            cache_folder(config.paths),
            make_loggers=lambda: make_objects(config.logger, "logger", **_given_to_loggers(folder)),
            make_callbacks=lambda: make_objects(config.callbacks, "callbacks"),
            on_prepared=on_prepared,
            module_class=module_class(config.stage.module),
        )
    except StopRequested as stop:
        end.stopped(stop.step)
        rank_zero_print(
            f"Stopped after step {stop.step:,}.{'' if is_child() else f' {how_to_go_on(folder.run, config.resume)}'}"
        )
        return 128 + stop.signum
    return 0


def _given_to_loggers(folder: StageFolder) -> dict[str, str]:
    """Where loggers write, and who the run is: the same after a stop, another one where the run is begun anew."""
    name = f"{folder.run}-{folder.stage}"
    about = folder.path / "about.json"
    begun = sha256_of_file(about)[:16] if about.exists() else name
    return {"save_dir": str(folder.path), "name": name, "run_name": name, "id": f"{folder.stage}-{begun}"}


def _say_plan(plan: Plan) -> None:
    rank_zero_print(
        f"Plan: {plan['parameters_total']:,} parameters, {plan['num_steps']:,} steps of"
        f" {plan['total_batch_tokens']:,} tokens. Each value with its reason: nanochat-pl plan, or plan.json."
    )
    if remark := width_remark(plan):
        rank_zero_print(remark)


def how_to_go_on(run: str, resume: str) -> str:
    """What a person does after a stop; the same again would begin yet another run where that was asked for."""
    how = f"With run={run} in place of resume=never it" if resume == "never" else "The same command"
    return f"{how} goes on from there."


def _next_commands(folder: StageFolder) -> list[tuple[str, str]]:
    run = run_keys(folder.run, folder.runs)
    what, command = stage_named(folder.stage).next_step
    return [(what, f"nanochat-pl {command} {run}"), ("tables and plots", f"nanochat-pl report {run}")]
