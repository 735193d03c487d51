"""Measures how fast a trained model generates on this machine, beside what the machine could.

nanochat-pl bench run=demo
nanochat-pl bench bundle=PATH 'batch_sizes=[1,64]' prompt_tokens=512 dtype=bfloat16
nanochat-pl bench run=demo 'batch_sizes=[1]' quantize=int8
nanochat-pl bench run=demo compile=true
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat_pl.common.device_settings import Accelerator
from nanochat_pl.common.imports import loading_libraries
from nanochat_pl.common.paths import PathsSettings, locate_bundle
from nanochat_pl.common.schema import UserPath, setting
from nanochat_pl.config.compose import compose
from nanochat_pl.engine.settings import BenchSettings
from nanochat_pl.model.config import Quantize


@dataclass(frozen=True)
class BenchConfig(BenchSettings):
    """The root of configs/bench.yaml."""

    run: str | None = setting(None, "Name of the run; null: the only one there is.")
    stage: str | None = setting(None, "Its stage; null: the newest that is finished.")
    bundle: UserPath | None = setting(None, "Folder of a bundle, instead of a run.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "What the model computes in; auto: what chat and evaluate take."
    )
    quantize: Quantize | None = setting(None, "int8: weights of 8 bits, for one stream on a CPU; null: as they are.")
    compile: bool | Literal["auto"] = setting(
        "auto",
        "Compile the decode step on a CPU, make CUDA graphs of it on a GPU; auto: on a CPU in float32 where it is"
        " faster, tried once; on a GPU no.",
    )
    accelerator: Accelerator = setting("auto", "Device to run on; auto: the best there is.")
    paths: PathsSettings = setting(factory=PathsSettings)


Config = BenchConfig


def run(arguments: Sequence[str]) -> int:
    """The command. The last line of standard output is the table as JSON."""
    config = compose("bench", BenchConfig, arguments).config
    folder = locate_bundle(config.bundle, config.run, config.stage, Path(config.paths.runs))
    with loading_libraries():
        from nanochat_pl.cli._bench import bench
    bench(config, folder)
    return 0
