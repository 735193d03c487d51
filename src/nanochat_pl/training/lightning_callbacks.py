"""Which of Lightning's callbacks work with these stages, and why the others are refused.

A stage does its own steps (manual optimization), validates outside of Lightning's loop and has one epoch without end.
Callbacks that build on what is missing then fail in the middle of a training, or do nothing and say nothing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from typing import Any

from nanochat_pl.common.errors import did_you_mean

# What Lightning's classes need besides: the package as pip calls it, and as Python does.
PACKAGES = {
    "CometLogger": ("comet-ml", "comet_ml"),
    "LitLogger": ("litlogger", "litlogger"),
    "MLFlowLogger": ("mlflow", "mlflow"),
    "WandbLogger": ("wandb", "wandb"),
}

WORKING = frozenset(
    {
        "Callback",
        "DeviceStatsMonitor",
        "EarlyStopping",
        "LearningRateMonitor",
        "ModelSummary",
        "RichModelSummary",
        "Timer",
    }
)

_RESUME_FILES = (
    "resume files are written by the program: see trainer.checkpoint_every_minutes, trainer.keep_last and keep_best"
)
_BAR = "the program shows a bar of its own, in optimizer steps, and lines where there is no terminal"
_FREEZING = "each parameter has its place in the one optimizer from the first step; none is frozen or added later"
_AVERAGES = (
    "a resume file holds the weights before they are averaged, so a run that goes on would miss steps; and validation"
    " measures the weights themselves"
)
_FUNCTIONS = "it takes functions, which no file can name; write a class"

REFUSED = {
    "BackboneFinetuning": _FREEZING,
    "BaseFinetuning": _FREEZING,
    "BasePredictionWriter": "nothing is predicted by Lightning; nanochat-pl evaluate writes answers",
    "BatchSizeFinder": "device_batch_size=auto finds the rows that fit; total_batch_tokens is what is trained with",
    "Checkpoint": _RESUME_FILES,
    "EMAWeightAveraging": _AVERAGES,
    "GradientAccumulationScheduler": "a step has total_batch_tokens; how often gradients are added up follows",
    "LambdaCallback": _FUNCTIONS,
    "LearningRateFinder": "learning rates follow from the plan; try others with -m optim.matrix_lr=0.01,0.02",
    "ModelCheckpoint": _RESUME_FILES,
    "ModelPruning": "pruned weights are other parameters than those that the optimizer and the bundle know",
    "OnExceptionCheckpoint": _RESUME_FILES,
    "ProgressBar": _BAR,
    "RichProgressBar": _BAR,
    "SpikeDetection": "see trainer.spike_sigmas and trainer.on_nonfinite",
    "StochasticWeightAveraging": "it begins at an epoch, and a stage has one; it sets learning rates of its own",
    "ThroughputMonitor": f"{_FUNCTIONS}; metrics.csv has tokens a second and MFU",
    "TQDMProgressBar": _BAR,
    "WeightAveraging": _AVERAGES,
}


# What validation hands to callbacks; of the sources of a mixture each has a metric of its own, val/bpb_NAME.
MEASURED = ("val/bpb", "val/bpb_stderr", "val/loss")


def base_of(group: str) -> type:
    """What the objects of a group of the settings are. Lightning takes seconds to import, so not with this module."""
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers.logger import Logger

    return {"logger": Logger, "callbacks": Callback}[group]


def why_refused(callback: type, arguments: Mapping[str, Any]) -> str | None:
    """Why a callback of this class, or of one that it builds on, is not to be made with these arguments; None: it may.

    What is said is to stand behind the callback's name in the settings.
    """
    ancestors = [each.__name__ for each in callback.__mro__ if each.__module__.startswith("lightning.")]
    for name in ancestors:
        if name in REFUSED:
            return f": Lightning's {name} does not work here: {REFUSED[name]}."
    if "DeviceStatsMonitor" in ancestors and _wants_psutil(arguments) and not _is_installed("psutil", "psutil"):
        return ": what it says of a CPU needs psutil: pip install psutil, or set cpu_stats: false."
    if "EarlyStopping" in ancestors:
        if arguments.get("check_on_train_epoch_end"):
            return ".check_on_train_epoch_end=true: a stage has one epoch, it would never be asked; leave it out."
        monitor = str(arguments.get("monitor"))
        if monitor not in MEASURED and not monitor.startswith("val/bpb_"):
            return f".monitor={monitor}: is not measured; {did_you_mean(monitor, MEASURED)}"
    return None


def _wants_psutil(arguments: Mapping[str, Any]) -> bool:
    from nanochat_pl.common.device import choose_device  # with torch, as for every class that is looked at

    cpu_stats = arguments.get("cpu_stats")
    return choose_device().type == "cpu" if cpu_stats is None else bool(cpu_stats)


def pip_line(target: type) -> str | None:
    """The command that installs what a class needs besides Lightning; None where that is nothing that is known."""
    package = _package_of(target)
    return f"pip install {package[0]}" if package else None


def missing_package(target: type) -> str | None:
    """As :func:`pip_line`, where that package is not installed."""
    package = _package_of(target)
    return f"pip install {package[0]}" if package and not _is_installed(*package) else None


def _package_of(target: type) -> tuple[str, str] | None:
    return next((PACKAGES[each.__name__] for each in target.__mro__ if each.__name__ in PACKAGES), None)


def _is_installed(distribution: str, module: str) -> bool:
    try:
        importlib.metadata.version(distribution)
        return True
    except importlib.metadata.PackageNotFoundError:
        found = importlib.util.find_spec(module)
        return found is not None and found.origin is not None  # a folder of the same name, wandb/, has none
