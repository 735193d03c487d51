"""Settings of `nanochat-pl train`: every key of configs/train.yaml is a field here or in the package that uses it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from nanochat_pl.common.device_settings import Accelerator, ComputeDType, Devices
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.paths import PathsSettings
from nanochat_pl.common.schema import setting
from nanochat_pl.data.cache.conversations import LossMask
from nanochat_pl.data.sources.base import DataSettings
from nanochat_pl.evaluation.core.settings import CoreSettings
from nanochat_pl.evaluation.samples import DEFAULT_PROMPTS
from nanochat_pl.model.config import AttentionBackend, ModelSettings
from nanochat_pl.optim.config import OptimSettings
from nanochat_pl.optim.schedules import ScheduleSettings
from nanochat_pl.planning.batch_size import RowOptions
from nanochat_pl.planning.gpus import Device
from nanochat_pl.planning.horizon import MAX_BATCH_TOKENS, HorizonSettings
from nanochat_pl.planning.memory import MemoryKnobs
from nanochat_pl.tasks.settings import MixtureSettings, MixtureTasks
from nanochat_pl.tokenizer.training import TokenizerSettings
from nanochat_pl.tools.sandbox.settings import SandboxSettings
from nanochat_pl.training.lightning_args import explain_argument
from nanochat_pl.training.rl.settings import RLSettings
from nanochat_pl.training.stages.registry import Stage, parents_of, stage_named

# What Lightning calls a compute type beside parameters in float32.
PRECISIONS: dict[str | int, ComputeDType] = {
    **dict.fromkeys(("bf16-mixed", "bf16"), "bfloat16"),
    **dict.fromkeys(("16-mixed", 16), "float16"),
    **dict.fromkeys(("32-true", 32), "float32"),
}
OnNonfinite = Literal["stop", "skip"]
_TIME = re.compile(r"(\d{1,3}):([01]?\d|2[0-3]):([0-5]?\d):([0-5]?\d)")


@dataclass(frozen=True)
class StageSettings:
    """Group `stage`: what a stage is."""

    name: str = setting("base", "Which stage this is; stage=NAME chooses it, or stage=package.module.Class.")
    parent: str | None = setting(
        None,
        "The stage whose result this one starts from; null: of those that it may start from the last one that is"
        " finished, so of sft mid, else base.",
    )
    num_epochs: float = setting(1.0, "Passes over the conversations, where max_steps is not given.", above=0)
    warm_start: bool = setting(True, "Start from the parent's optimizer moments (with fresh learning rates).")
    module: str | None = setting(
        None, "Class of the LightningModule, package.module.Class, a subclass of nanochat_pl.LMModule; null: that."
    )
    loss_mask: LossMask | None = setting(
        None,
        "Of mid and sft: which tokens of a conversation the loss is taken of: assistant, what the assistant writes; or"
        " all of them; null: all of mid, assistant of sft.",
    )

    def __post_init__(self) -> None:
        possible = parents_of(self.definition)
        if self.parent is not None and self.parent not in possible:
            known = " or ".join(possible) or "nothing"
            raise UserError(f"parent={self.parent}: the stage {self.name} starts from {known}.")
        if self.loss_mask is not None and not self.trains_on_conversations:
            raise UserError(
                f"loss_mask={self.loss_mask}: the stage {self.name} has no conversations, so nothing is masked.",
                fix="Leave it out, or set it for the stages mid and sft.",
            )

    @property
    def definition(self) -> Stage:
        """What the stage is."""
        return stage_named(self.name)

    @property
    def trains_on_conversations(self) -> bool:
        """Whether it is trained on conversations."""
        return self.definition.trains_on_conversations

    @property
    def effective_loss_mask(self) -> LossMask:
        """``loss_mask``, or what null means for this stage."""
        return self.loss_mask or self.definition.loss_mask


@dataclass(frozen=True)
class TrainerSettings:
    """Group `trainer`: hardware, logging and checkpointing. Does not affect the result."""

    accelerator: Accelerator = setting("auto", "Device to train on; auto: the best there is; gpu: cuda or mps.")
    devices: Devices = setting(
        "auto",
        "Processes, each on a device of its own; auto: all GPUs of the machine, else one. More than one are started by"
        " the command itself, unless a launcher has started it.",
    )
    num_nodes: int = setting(
        1, "Machines; more than one need a launcher: torchrun or Slurm.", at_least=1, at_most=10_000
    )
    strategy: Literal["auto", "ddp", "fsdp"] = setting(
        "auto",
        "Data parallel: the optimizer sums the gradients and shards its state (ZeRO-1); ddp: with Lightning's wrapper"
        " around the model, auto: without, with the same losses; fsdp: weights and gradients are sharded too (FSDP2),"
        " which saves memory and costs time.",
    )
    precision: Literal["bf16-mixed", "bf16", "16-mixed", 16, "32-true", 32] | None = setting(
        None, "Lightning's way to say model.compute_dtype: bfloat16, float16, float32; null: as that key says."
    )
    fp8: bool | Literal["auto", "emulate"] = setting(
        False,
        "Multiply the blocks' large matrices in FP8, with a scale for each tensor; not in evaluation, sampling and rl."
        " auto: where the GPU can and the model computes in bfloat16; emulate: only round as it does, slow, on any"
        " device.",
    )
    num_threads: int | None = setting(None, "CPU threads of torch; null: as torch decides.", at_least=1, at_most=1024)
    compile: bool | Literal["auto"] = setting(
        "auto", "torch.compile the model; auto: where a compiler is at hand and it is worth it, not in rl."
    )
    attention: AttentionBackend = setting(
        "auto",
        "What computes attention over whole rows, where it can; auto: the first that is right on the device: see"
        " selftest.",
    )
    deterministic: bool = setting(False, "Only algorithms that give the same bits again (a CPU always does).")
    activation_checkpointing: bool = setting(
        False, "Keep only what goes into each block and compute the rest again: less memory, up to a third more time."
    )
    loss_chunk_tokens: int | None = setting(
        None, "Tokens whose logits are in memory at once; null: as suits vocabulary and device.", at_least=1
    )
    num_workers: int | None = setting(
        None,
        "Loader processes that read rows ahead of the training; null: one for a GPU, else none.",
        at_least=0,
        at_most=64,
    )
    on_nonfinite: OnNonfinite = setting(
        "stop", "What to do with a step whose loss or gradient is not finite: stop the run, or skip the step."
    )
    log_every_steps: int = setting(1, "Steps between two lines of metrics.", at_least=1)
    checkpoint_every_minutes: float = setting(10.0, "Minutes between two resume files.", above=0)
    checkpoint_every_steps: int | None = setting(
        None, "Steps between two resume files, in place of the minutes: at exactly these steps.", at_least=1
    )
    keep_last: int = setting(2, "Resume files that are kept; the older ones go.", at_least=2, at_most=1000)
    keep_best: int = setting(
        0, "Further ones that are kept: of the measured steps those with the lowest val/bpb.", at_least=0, at_most=1000
    )
    max_time: str | None = setting(
        None, "Time of training, days:hours:minutes:seconds as 00:11:30:00, after which it stops as on a signal."
    )
    check_processes_every_steps: int = setting(
        100, "Steps between two checks that all processes hold the same weights; 0: never.", at_least=0
    )
    spike_sigmas: float = setting(
        6.0,
        "Report the rows of a step whose loss is this many robust standard deviations above the recent ones; 0: never.",
        at_least=0,
    )
    detect_anomaly: bool = setting(False, "Find the operation that made a gradient NaN: many times slower.")
    profiler: Literal["simple", "advanced", "pytorch"] | None = setting(
        None, "Measure what takes the time of a step, into profile files in the stage's folder."
    )

    explain_unknown = staticmethod(explain_argument)

    def __post_init__(self) -> None:
        if self.max_time is not None and not self.max_seconds:
            if _TIME.fullmatch(self.max_time):
                raise UserError(f"max_time={self.max_time}: is no time at all; max_time=null sets no limit.")
            raise UserError(
                f"max_time={self.max_time}: is not a time of the form days:hours:minutes:seconds, as 00:11:30:00 for"
                " eleven and a half hours."
            )

    @property
    def max_seconds(self) -> float | None:
        """``max_time`` in seconds; 0 where it cannot be read."""
        if self.max_time is None:
            return None
        match = _TIME.fullmatch(self.max_time)
        days, hours, minutes, seconds = map(int, match.groups()) if match else (0, 0, 0, 0)
        return ((days * 24.0 + hours) * 60 + minutes) * 60 + seconds


@dataclass(frozen=True)
class EvaluationSettings:
    """Node `evaluation` of a training run: what is measured while it trains."""

    every_steps: int = setting(250, "Steps between two validations (bits per byte); 0: only at the end.", at_least=0)
    num_rows: int | None = setting(None, "Validation rows; null: as the plan says.", at_least=1)
    num_tokens: int | None = setting(
        None,
        "Validation tokens, in place of num_rows: so many batches as num_tokens // (device_batch_size * sequence_len"
        " * processes).",
        at_least=1,
        at_most=MAX_BATCH_TOKENS,
    )
    at_start: bool | None = setting(None, "Validate before the first step too; null: base does, other stages do not.")
    samples_every_steps: int = setting(2000, "Steps between two sets of samples; 0: only at the end.", at_least=0)
    sample_prompts: list[str] = setting(
        factory=lambda: list(DEFAULT_PROMPTS), doc="What the samples continue.", max_length=100
    )
    sample_tokens: int = setting(16, "New tokens of a sample.", at_least=1, at_most=4096)
    core_every_steps: int | None = setting(
        2000, "Of base: steps between two measurements of CORE; 0: only at the end; null: never.", at_least=0
    )
    core: CoreSettings = setting(
        factory=CoreSettings, doc="Which data CORE takes, and how much; left out where it is not here."
    )
    chat_every_steps: int | None = setting(
        200, "Of mid and sft: steps between two measurements of chat; 0: only at the end; null: never.", at_least=0
    )
    chat: MixtureTasks = setting(factory=MixtureTasks, doc="The tasks that are measured then, as in mixture.tasks.")
    chat_limit: int | None = setting(
        None, "Problems of each task whose answer is a letter; null: all that it holds out.", at_least=1
    )
    chat_limit_generative: int | None = setting(
        24, "Problems of each task whose answer is written; null: all that it holds out.", at_least=1
    )
    chat_max_tokens: int = setting(256, "Most tokens of a written answer.", at_least=1, at_most=4096)
    sandbox: SandboxSettings = setting(factory=SandboxSettings, doc="Where code that a model wrote is run.")

    def __post_init__(self) -> None:
        if self.num_rows is not None and self.num_tokens is not None:
            raise UserError(
                f"num_tokens={self.num_tokens}: num_rows={self.num_rows} says how much already; set one of them only."
            )


@dataclass(frozen=True)
class TrainConfig(HorizonSettings):
    """The root of configs/train.yaml. The horizon's keys (max_steps, total_batch_tokens …) stand at the root."""

    stage: StageSettings = setting(factory=StageSettings)
    tokenizer: TokenizerSettings = setting(factory=TokenizerSettings)
    model: ModelSettings = setting(factory=ModelSettings)
    optim: OptimSettings = setting(factory=OptimSettings)
    schedule: ScheduleSettings = setting(factory=ScheduleSettings)
    data: DataSettings = setting(factory=lambda: DataSettings(name="auto"))
    mixture: MixtureSettings = setting(factory=MixtureSettings)
    rl: RLSettings = setting(factory=RLSettings)
    trainer: TrainerSettings = setting(factory=TrainerSettings)
    evaluation: EvaluationSettings = setting(factory=EvaluationSettings)
    paths: PathsSettings = setting(factory=PathsSettings)
    logger: dict[str, Any] = setting(factory=dict, doc="Loggers, each with a _target_ (configs/logger).")
    callbacks: dict[str, Any] = setting(factory=dict, doc="Further Lightning callbacks, each with a _target_.")
    run: str | None = setting(None, "Name of the run; null: d<depth>.", max_length=200)
    device_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = setting(
        "auto",
        "Rows in memory at once: memory, not results; auto: as the plan says. Halved where memory runs out.",
    )
    seed: int = setting(42, "Seed of weights, row order and mixture.", at_least=0, at_most=2**31)
    resume: Literal["auto", "never"] = setting("auto", "Go on with an unfinished run of that name, or begin a new one.")
    resume_with_changes: bool = setting(False, "Go on also where settings or data changed that alter the result.")
    check_only: bool = setting(False, "Compose, check and plan; train nothing.")
    yes: bool = setting(False, "Train also what is refused unasked: hours on a CPU, more than four epochs.")

    explain_unknown = staticmethod(explain_argument)

    def __post_init__(self) -> None:
        asked, dtype = self.trainer.precision, self.model.compute_dtype
        if asked is not None and dtype not in ("auto", PRECISIONS[asked]):
            raise UserError(
                f"trainer.precision={asked}: is model.compute_dtype={PRECISIONS[asked]}, and that key says {dtype}.",
                fix="Set one of them.",
            )
        if asked is not None:  # one key says it from here on, and stands in the record of the run
            object.__setattr__(self, "model", replace(self.model, compute_dtype=PRECISIONS[asked]))
        if self.trainer.strategy == "fsdp" and self.stage.definition.trains_on_answers:
            raise UserError(
                f"trainer.strategy=fsdp: the stage {self.stage.name} writes answers with the whole weights, so each"
                " process needs them.",
                fix="Use trainer.strategy=auto; in a pipeline stages.rl.trainer.strategy=auto.",
            )
        if self.stage.definition.trains_on_answers and (problems := self.rl.problems()):
            raise UserError([f"rl.{problem}" for problem in problems])
        if self.trainer.keep_best and not self.evaluation.every_steps:
            raise UserError(
                f"trainer.keep_best={self.trainer.keep_best}: nothing is measured before the end, with"
                " evaluation.every_steps=0.",
                fix="Set evaluation.every_steps, or trainer.keep_best=0.",
            )


def memory_knobs(config: TrainConfig, compiled: bool = False) -> MemoryKnobs:
    """What the settings say of time for memory. ``compiled``: whether the model is."""
    return MemoryKnobs(config.trainer.activation_checkpointing, config.trainer.loss_chunk_tokens, compiled)


def row_options(config: TrainConfig, device: Device, num_devices: int = 1, compiled: bool = False) -> RowOptions:
    """What the plan of the rows needs of the settings, and of what the machine has chosen."""
    return RowOptions(
        device=device,
        knobs=memory_knobs(config, compiled),
        num_devices=num_devices,
        device_batch_size=None if config.device_batch_size == "auto" else config.device_batch_size,
        validation_rows=config.evaluation.num_rows,
        validation_tokens=config.evaluation.num_tokens,
        evaluate_every_steps=config.evaluation.every_steps,
    )
