"""What becomes of each argument of Lightning's Trainer: ours by the same name or another, or refused with a reason.

A Trainer takes most of them beside a stage that does its own steps, and then does nothing with them. So none is passed
on: who types one is told what to type here. A test goes through the Trainer's signature.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Ours(NamedTuple):
    """A key of the group ``trainer`` here too."""


class Use(NamedTuple):
    """Something else is typed here.

    Attributes:
        example: what; ``{}`` stands for the value.
        value: makes it of the text that was given for Lightning's argument.
        note: what else is to be known.
    """

    example: str
    value: Callable[[str], str] = str
    note: str = ""


class Refused(NamedTuple):
    """There is no such thing here, and why."""

    why: str


def _fitting(pattern: str, otherwise: str) -> Callable[[str], str]:
    """The value as it was given where it can be one of ours, else an example."""
    return lambda text: text if re.fullmatch(pattern, text) else otherwise


def _whole(otherwise: int) -> Callable[[str], str]:
    return _fitting(r"[1-9]\d*", str(otherwise))


def _number(otherwise: float) -> Callable[[str], str]:
    return _fitting(r"\d*[1-9]\d*(\.\d*)?|\d*\.\d*[1-9]\d*", str(otherwise))


ARGUMENTS: dict[str, Ours | Use | Refused] = {
    # The machine.
    "accelerator": Ours(),
    "deterministic": Ours(),
    "detect_anomaly": Ours(),
    "profiler": Ours(),
    "strategy": Ours(),
    "devices": Ours(),
    "num_nodes": Ours(),
    "precision": Ours(),
    "benchmark": Refused("it times cuDNN's convolutions, and the model has none"),
    "sync_batchnorm": Refused("the model has no batch norm"),
    "plugins": Refused("precision, processes and checkpoints are this project's own"),
    "inference_mode": Refused("validation runs without gradients and never through Lightning's loops"),
    # The length.
    "max_steps": Use("max_steps={}", _whole(1000)),
    "max_epochs": Use(
        "stage.num_epochs={}", _number(1), "It is for stage=sft; stage=base is as long as max_steps=1000 says."
    ),
    "min_steps": Refused("a stage makes all its steps; only a callback that you add ends it before"),
    "min_epochs": Refused("a stage makes all its steps; only a callback that you add ends it before"),
    "max_time": Ours(),
    "fast_dev_run": Use("max_steps={}", _whole(1), "check_only=true checks and plans, and trains nothing."),
    "limit_train_batches": Use("max_steps={}", _whole(1000), "A batch of Lightning's is an optimizer step here."),
    "overfit_batches": Use(
        "data=local data.path=little.txt max_steps=200", note="The rows of a short text come again and again."
    ),
    # The step.
    "accumulate_grad_batches": Use(
        "total_batch_tokens=65536 device_batch_size=4",
        note="The tokens of a step and the rows in memory at once: how often gradients are added up follows.",
    ),
    "gradient_clip_val": Use("optim.max_grad_norm={}", _number(1.0)),
    "gradient_clip_algorithm": Use(
        "optim.max_grad_norm=1.0", note="By the norm of the whole gradient; clipping by value is not supported."
    ),
    # Validation.
    "val_check_interval": Use("evaluation.every_steps={}", _whole(250), "In optimizer steps."),
    "check_val_every_n_epoch": Use("evaluation.every_steps=250", note="In optimizer steps."),
    "limit_val_batches": Use("evaluation.num_rows={}", _whole(64), "In rows."),
    "limit_test_batches": Refused("nothing is tested by Lightning; nanochat-pl evaluate takes limit=N"),
    "limit_predict_batches": Refused("nothing is predicted by Lightning; nanochat-pl chat answers"),
    "num_sanity_val_steps": Refused("the rows for validation are read and checked before the first step anyway"),
    # What is written and shown.
    "logger": Use("logger=[tensorboard]", note="metrics.csv is always written; logger=[] leaves out all else."),
    "callbacks": Use("callbacks=[early_stopping]", note="The files of configs/callbacks; your own go there too."),
    "log_every_n_steps": Use("trainer.log_every_steps={}", _whole(10)),
    "enable_checkpointing": Use("trainer.checkpoint_every_minutes=60", note="Resume files are always written."),
    "enable_progress_bar": Refused("a bar is shown on a terminal alone; `… | cat` shows a line now and then"),
    "enable_model_summary": Use("callbacks=[model_summary]", note="nanochat-pl plan counts the parameters too."),
    "default_root_dir": Use("paths.runs={}", _fitting(r"[^\s…]+", "runs")),
    "barebones": Refused("it leaves out what lets a stopped run go on; the overhead of a step is below a millisecond"),
    "enable_autolog_hparams": Refused("the settings of a run stand in its config.yaml, and go to no logger"),
    "model_registry": Refused("what a stage trained is its bundle, a folder; nothing is uploaded"),
    # The data.
    "use_distributed_sampler": Refused("each process reads its own share of the rows, which have numbers"),
    "reload_dataloaders_every_n_epochs": Refused("row n of a run is the same text whenever it is read"),
}


_RESUME = (
    "names no file here: the same command goes on with its run, from the newest resume file that is whole; with other"
    " settings, begin a new run: run=NEW or resume=never"
)
OF_FIT = {"ckpt_path": _RESUME, "resume_from_checkpoint": _RESUME}  # the second: of older versions


def explain_argument(name: str, value: Any) -> str | None:
    """What is said of an argument of the Trainer that was typed with a value; None of other names, and of ours."""
    if name in OF_FIT:
        return f": {OF_FIT[name]}."
    text = value if isinstance(value, str) else json.dumps(value)
    match ARGUMENTS.get(name):
        case Use(example, of_text, note):
            said = f"={text}: is an argument of Lightning's Trainer; use {example.replace('{}', of_text(text))}"
            return f"{said}{'' if example.endswith('…') else '.'} {note}".rstrip()
        case Refused(why):
            return f"={text}: is an argument of Lightning's Trainer that is not supported: {why}."
    return None
