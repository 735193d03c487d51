"""What is written to the ledger: the end of a stage's process, and what a trained stage's inference costs."""

from __future__ import annotations

import dataclasses
import math
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nanochat_pl.bundle.stage_info import load_stage_info
from nanochat_pl.cli.run_record import OF_THE_COMMAND, flat, last_code
from nanochat_pl.common.console import rank_zero_print
from nanochat_pl.common.device import device_name
from nanochat_pl.common.errors import UserError, first_line
from nanochat_pl.common.run_dir import StageFolder
from nanochat_pl.config.compose import Composed
from nanochat_pl.config.experiment import compose_step
from nanochat_pl.config.overrides import take_key
from nanochat_pl.distributed import collectives
from nanochat_pl.ledger import Entry, append, newest, read_ledger
from nanochat_pl.ledger.entry import Exit
from nanochat_pl.report.read import StageRecord, read_stage
from nanochat_pl.training.config import TrainConfig
from nanochat_pl.training.device import own_device
from nanochat_pl.training.stages.registry import StageData

STDERR = "_stderr"
TAIL_BYTES = 2**12


class EndOfStage:
    """Appends an entry to the ledger when the process of a stage ends, however it does; and one before it trains, which
    is all that there is of a process that is killed.

    As a context manager around the whole training. Of a start that was refused before there was anything to train with,
    and of a stage that was finished before, there is no entry. Only the main process writes. What keeps it from writing
    is said in one line: no training is lost for it.
    """

    def __init__(self, composed: Composed[TrainConfig], folder: StageFolder) -> None:
        self.composed, self.folder = composed, folder
        self._before: tuple[int, bytes] | None = None
        self._is_begun = False
        self._is_noted = False
        self._data: str | None = None
        self._tokenizer: str | None = None
        self._stopped_after: int | None = None
        self._said = ""

    def begin(self) -> None:
        """The stage is not finished yet: from here on there is something to note."""
        self._is_begun = True

    def prepared(self, data: StageData) -> None:
        """What the stage trains with is known: its training begins."""
        self._data, self._tokenizer = data.data.get("fingerprint"), data.tokenizer.fingerprint
        if self._is_begun and collectives.is_rank_zero():
            self._is_noted = self._append("started", None)

    def stopped(self, step: int) -> None:
        """A signal has ended the training after this step, of which there may be no line of metrics."""
        self._stopped_after = step

    def __enter__(self) -> EndOfStage:
        self._before = self._trained()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_begun or not collectives.is_rank_zero():
            return
        is_refused = isinstance(error, UserError) and not self._is_noted
        if is_refused and self._trained() == self._before:
            return
        exit: Exit = "stopped"
        if self.folder.status == "finished":
            exit = "finished"
        elif error is not None and not isinstance(error, KeyboardInterrupt):
            exit = "failed"
        self._append(exit, error)

    def _append(self, exit: Exit, error: BaseException | None) -> bool:
        """Whether it could be done."""
        try:
            append(self.folder.runs, self._entry(exit, error))
        except Exception as problem:  # of whatever kind: the training is worth more than a line about it
            said = problem.in_one_line if isinstance(problem, UserError) else first_line(problem)
            self._say_once(f"The ledger has no entry of {self.folder.path}: {said}")
            return False
        return True

    def _say_once(self, text: str) -> None:
        if text != self._said:
            rank_zero_print(text)
        self._said = text

    def _trained(self) -> tuple[int, bytes] | None:
        """How far the training is, to see whether it has come further: the size of its metrics and their last lines.

        Not the time of the file: a start that is refused may have written the same lines again.
        """
        metrics = self.folder.path / "metrics.csv"
        if not collectives.is_rank_zero() or not metrics.is_file():
            return None
        with metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            return size, file.read()

    def _entry(self, exit: Exit, error: BaseException | None) -> Entry:
        config = self.composed.config
        machine = {
            "host": socket.gethostname(),
            "device": device_name(own_device(config.trainer.accelerator)),
            "processes": collectives.world_size(),
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }
        entry = entry_of(self.folder, exit, self.composed)
        return dataclasses.replace(
            entry,
            error=_in_one_line(error) if exit == "failed" and error is not None else None,
            data=self._data or entry.data,
            tokenizer=self._tokenizer or entry.tokenizer,
            machine=machine,
            steps=entry.steps if self._stopped_after is None or exit == "finished" else self._stopped_after,
        )


def entry_of(folder: StageFolder, exit: Exit, composed: Composed[TrainConfig]) -> Entry:
    """What the files of a stage say, as an entry; its machine and an error are not among them.

    Raises:
        UserError: one of the files is damaged.
    """
    record = read_stage(folder.path)
    metrics = {name: series.last for name, series in record.series.items() if series.last is not None} | record.metrics
    commit, _, changed = str(last_code(folder).get("git", "")).partition(" ")
    data, tokenizer = _fingerprints(folder)
    tokens = metrics.get("train/tokens", 0)
    per_token = record.planned("flops_per_token") or 0.0
    settings = flat(composed.plain())
    return Entry(
        run=folder.run,
        stage=folder.stage,
        exit=exit,
        time=_now(),
        parent_run=None if folder.parent_run == folder.run else folder.parent_run,
        settings=_for_json(settings),
        changed=_for_json(_changed(settings, composed)),
        git={"commit": commit, "dirty": bool(changed)} if commit else {},
        data=data,
        tokenizer=tokenizer,
        steps=record.step or 0,
        tokens=int(tokens),
        flops=float(metrics.get("train/flops", tokens * per_token)),
        seconds=float(record.seconds if record.seconds is not None else metrics.get("train/seconds", 0.0)),
        metrics={name: value for name, value in metrics.items() if STDERR not in name},
        best=_best(record),
        errors={name.replace(STDERR, ""): value for name, value in metrics.items() if STDERR in name},
    )


def note_inference(folder: StageFolder, inference: Mapping[str, float], on: Mapping[str, Any]) -> None:
    """Append the newest entry of a trained stage once more, with what its inference costs.

    Args:
        folder: of the stage.
        inference: the figures, as :class:`~nanochat_pl.ledger.Entry` names them.
        on: host, device and compute type that they were measured with.
    """
    try:
        known = [each for each in read_ledger(folder.runs) if each.exit != "started"]
        found = [each for each in newest(known) if (each.run, each.stage) == _name(folder)]
        if found:
            entry = dataclasses.replace(found[0], time=_now(), inference=dict(inference), inference_on=dict(on))
            append(folder.runs, entry)
    except UserError as error:
        rank_zero_print(f"The ledger has no entry of this measurement: {error.in_one_line}")


def _name(folder: StageFolder) -> tuple[str, str]:
    return folder.run, folder.stage


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, UserError):
        return " ".join(error.problems)
    return f"{type(error).__name__}: {first_line(error)}"


def _changed(settings: Mapping[str, Any], composed: Composed[TrainConfig]) -> dict[str, Any]:
    """The settings that are not those of the same command without any keys."""
    stage, _ = take_key(composed.overrides, "stage")
    try:
        defaults = flat(compose_step("train", stage or "base", TrainConfig, []).plain())
    except UserError:  # of a root file of the user's that is complete with the keys of the command alone
        defaults = flat(Composed(TrainConfig()).plain())
    missing = object()
    own = {key: value for key, value in settings.items() if key not in OF_THE_COMMAND}
    return {key: value for key, value in own.items() if defaults.get(key, missing) != value}


def _fingerprints(folder: StageFolder) -> tuple[str | None, str | None]:
    """Of the data and the tokenizer, where the bundle names them."""
    if not (folder.bundle / "stage.json").is_file():
        return None, None
    data = load_stage_info(folder.bundle).data
    return data.get("fingerprint"), data.get("tokenizer") if isinstance(data.get("tokenizer"), str) else None


def _best(record: StageRecord) -> dict[str, float]:
    """Of what is measured beside the training the best value: the lowest loss, the highest accuracy."""
    best: dict[str, float] = {}
    for name in {*record.series, *record.metrics}:
        values = [*record.column(name).values, *([record.metrics[name]] if name in record.metrics else [])]
        kind = name.partition("/")[0]
        if values and STDERR not in name and (kind in ("val", "core", "chat") or kind.startswith("pass_at_")):
            best[name] = min(values) if kind == "val" else max(values)
    return dict(sorted(best.items()))


def _for_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of classes of the user's may be infinite, which JSON has no word for."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def folder_of_bundle(bundle: Path, runs: Path) -> StageFolder | None:
    """The stage whose bundle it is; None: it lies elsewhere."""
    stage = bundle.parent
    if bundle.name != "bundle" or stage.parent.parent.resolve() != runs.resolve():
        return None
    return StageFolder(runs, stage.parent.name, stage.name, parent_run=stage.parent.name)
