"""Measures a trained stage: suites of tasks, bits per byte, samples; as tables, JSON and CSV.

nanochat-pl evaluate run=demo
nanochat-pl evaluate run=demo stage=base 'suites=[bpb,core,samples]'
nanochat-pl evaluate bundle=PATH to=FOLDER
nanochat-pl evaluate run=new against=demo
torchrun --nproc-per-node 8 -m nanochat_pl.cli.main evaluate run=demo

Each finished task is kept: the same command goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanochat_pl.cli.evaluate_settings import EvaluateConfig, places
from nanochat_pl.cli.launch import launch, processes_to_start
from nanochat_pl.cli.train import require_same_settings_everywhere
from nanochat_pl.common.imports import loading_libraries
from nanochat_pl.config.experiment import compose_step
from nanochat_pl.distributed import coordination

Config = EvaluateConfig
EXTRA_KEYS = {"experiment=NAME": "Take the settings of an experiment file (its section evaluate)."}


def run(arguments: Sequence[str]) -> int:
    """The command."""
    composed = coordination.raise_on_all_ranks(lambda: compose_step("evaluate", "evaluate", EvaluateConfig, arguments))
    config = composed.config
    source, to = coordination.raise_on_all_ranks(lambda: places(config, composed.experiment))
    with loading_libraries():
        from nanochat_pl.cli._evaluate import evaluate
    if (number := coordination.raise_on_all_ranks(lambda: processes_to_start(config.accelerator, config.devices))) > 1:
        return launch(["evaluate", *arguments], number)
    require_same_settings_everywhere(composed)
    evaluate(config, source, to)
    return 0
