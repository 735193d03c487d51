"""Settings of the command `evaluate`, and which folders they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat_pl.common.device_settings import Accelerator, Devices
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.paths import PathsSettings, cache_folder, locate_bundle, locate_stage
from nanochat_pl.common.run_dir import require_outside
from nanochat_pl.common.schema import UserGlob, UserPath, build, setting, to_plain
from nanochat_pl.data.sources.run_corpus import RunCorpus
from nanochat_pl.evaluation.core.settings import CoreSettings
from nanochat_pl.evaluation.harness.settings import HarnessSettings
from nanochat_pl.evaluation.suites import CHATCORE, Suite
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.settings import MixtureTasks
from nanochat_pl.tools.sandbox.settings import SandboxSettings

# What is measured where nothing else is said. A base model has seen no conversation.
BASE_SUITES: tuple[Suite, ...] = ("bpb", "core", "samples")
CHAT_SUITES: tuple[Suite, ...] = ("chat", "chatcore", "samples")
# Keys that say where things are and how fast it goes, and nothing of the metrics.
_IRRELEVANT = {"run", "stage", "bundle", "to", "batch_size", "accelerator", "devices", "paths"}


def chatcore_tasks() -> MixtureTasks:
    """The tasks of ChatCORE, each with the settings that it has by itself."""
    return build(MixtureTasks, {name: {} for name in CHATCORE}, "chatcore")


@dataclass(frozen=True)
class EvaluateConfig:
    """The root of configs/evaluate.yaml."""

    run: str | None = setting(None, "Name of the run; null: the only one there is.")
    stage: str | None = setting(None, "Its stage; null: the newest that is finished.")
    bundle: UserPath | None = setting(None, "Folder of a bundle, instead of a run.")
    to: UserPath | None = setting(None, "Folder of the results; null: evaluation/STAGE in the run's folder.")
    suites: list[Suite] | None = setting(
        None,
        "What to measure: bpb, core, chat (the tasks that it was trained on), chatcore, samples, harness, tokenizer;"
        " null: as it suits the stage, as far as the data is here.",
    )
    against: UserPath | None = setting(
        None,
        "Another model to compare with, on the same problems: RUN, RUN/STAGE, a bundle, or a folder of results.",
    )
    limit: int | None = setting(200, "chat, chatcore: most problems of a task, a seeded choice; null: all.", at_least=1)
    max_tokens: int = setting(256, "Most tokens of an answer.", at_least=1, at_most=4096)
    num_samples: int = setting(1, "Answers to each problem; pass@k for k up to that.", at_least=1, at_most=1000)
    temperature: float = setting(0.0, "0: the most likely token; else tokens are drawn.", at_least=0, at_most=10)
    top_k: int | None = setting(None, "Draw from so many most likely tokens; null: from all.", at_least=1)
    seed: int = setting(0, "Seed of what is drawn.", at_least=0)
    data_target: str | None = setting(
        None,
        "The class that a run with data=custom was trained with, named again: what a bundle names is not imported.",
    )
    data_path: UserGlob | None = setting(
        None,
        "Text for bits per byte: file, folder or glob; null: the data that the model was trained on.",
    )
    num_rows: int = setting(512, "Validation rows for bits per byte, or as many as there are.", at_least=1)
    batch_size: int = setting(32, "Rows at once: memory and time, not results.", at_least=1, at_most=4096)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Type that is computed in; auto: what the device does well."
    )
    accelerator: Accelerator = setting("auto", "Device to run on; auto: the best there is.")
    devices: Devices = setting(
        "auto",
        "Processes that share out the problems, each on a device of its own; auto: all GPUs of the machine, else one.",
    )
    core: CoreSettings = setting(factory=CoreSettings)
    chatcore: MixtureTasks = setting(factory=chatcore_tasks)
    harness: HarnessSettings = setting(factory=HarnessSettings)
    sandbox: SandboxSettings = setting(factory=SandboxSettings)
    paths: PathsSettings = setting(factory=PathsSettings)

    def __post_init__(self) -> None:
        problems = []
        if self.suites is not None and not self.suites:
            problems.append("suites=[]: names nothing to measure; null takes what suits the stage.")
        if self.num_samples > 1 and self.temperature == 0:
            problems.append(
                f"num_samples={self.num_samples}: with temperature=0 all answers to a problem are the same; set"
                " temperature=1."
            )
        if self.top_k is not None and self.temperature == 0:
            problems.append(f"top_k={self.top_k}: has no meaning with temperature=0; set temperature=1.")
        if problems:
            raise UserError(problems)

    @property
    def cache(self) -> Path:
        """The folder of caches."""
        return cache_folder(self.paths)

    def context(self, where: str, corpus: RunCorpus | None = None) -> TaskContext:
        """What tasks are built with: ``where`` is the group that they are keys of, ``corpus`` the run's."""
        hub = self.paths.hub_folder
        return TaskContext(self.cache, hub=hub, sandbox=self.sandbox, where=where, run_corpus=corpus)


def asked(config: EvaluateConfig) -> dict[str, Any]:
    """The settings that the metrics depend on, as plain data."""
    return {key: value for key, value in to_plain(config).items() if key not in _IRRELEVANT}


def places(config: EvaluateConfig, experiment: str) -> tuple[Path, Path]:
    """The bundle to measure and the folder of the results."""
    runs = Path(config.paths.runs)
    if config.to is not None:
        require_outside(Path(config.to))
    if config.bundle is not None:
        if config.to is None:
            raise UserError("to: is missing: with bundle=PATH it names the folder of the results.")
        return locate_bundle(config.bundle, config.run, config.stage, runs), Path(config.to)
    stage = locate_stage(config.run or experiment or None, config.stage, runs)
    return stage.bundle, Path(config.to) if config.to else runs / stage.run / "evaluation" / stage.stage
