"""What a stage is, and which ones there are: each registers itself where its class is defined.

A stage is one file of this folder, of another package (which names its module as an entry point of the group
``nanochat_pl.stages``), or of the current folder: its class is then named as ``package.module.Class``::

    @stage("polish")
    class Polish(Sft): ...

Light to import: what a stage trains with is imported where it is prepared.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.import_class import import_class
from nanochat_pl.common.registry import Registry
from nanochat_pl.common.run_dir import RESULTS, STAGES
from nanochat_pl.common.user_code import user_code

if TYPE_CHECKING:
    from torch import Tensor

    from nanochat_pl.common.run_dir import StageFolder
    from nanochat_pl.data.cache.conversations import LossMask
    from nanochat_pl.data.packing.mixture import MixedRows
    from nanochat_pl.data.packing.rows import Rows
    from nanochat_pl.data.sources.run_corpus import RunCorpus
    from nanochat_pl.evaluation.validation import Validation
    from nanochat_pl.model.config import GPTConfig
    from nanochat_pl.planning import Plan
    from nanochat_pl.tokenizer import Tokenizer
    from nanochat_pl.training.callbacks.benchmarks import Benchmark
    from nanochat_pl.training.config import TrainConfig
    from nanochat_pl.training.device import Machine
    from nanochat_pl.training.module import LMModule


@dataclass(frozen=True)
class StageContext:
    """What a stage is prepared from.

    Attributes:
        config: the checked settings, with what is inherited from the parent stage.
        folder: of the stage.
        cache: where corpora and tokens are kept.
        machine: device and type that it is trained with.
        corpus: the run's corpus of docstrings.
        resuming: whether there is a resume file: the stage keeps to the files of data sets that it was begun with.
    """

    config: TrainConfig
    folder: StageFolder
    cache: Path
    machine: Machine
    corpus: RunCorpus
    resuming: bool = False


@dataclass(frozen=True)
class StageData:
    """All that a stage trains with.

    Attributes:
        plan: the derived values.
        model: the architecture.
        tokenizer: what made the ids.
        rows: at least as many as the plan's steps take.
        validation: fixed rows.
        data: what it is trained on, for the record.
        weights, moments: what a stage that has a parent starts from, by name.
        parents: stage, step and SHA-256 of the weights of each earlier stage.
        make_module: makes the LightningModule of what LMModule is made of; None: that is LMModule, or stage.module.
        benchmarks: further ones that are measured while it trains.
    """

    plan: Plan
    model: GPTConfig
    tokenizer: Tokenizer
    rows: Rows | MixedRows
    validation: Validation
    data: dict[str, Any]
    weights: Mapping[str, Tensor] | None = None
    moments: Mapping[str, Tensor] | None = None
    parents: tuple[dict[str, Any], ...] = ()
    make_module: Callable[..., LMModule] | None = None
    benchmarks: Sequence[Benchmark] = ()


class Stage:
    """A stage of training: a subclass says what it is, and prepares what it trains with. The training is the same.

    Attributes:
        name: given by :func:`~nanochat_pl.training.stages.registry.stage`.
        parents: the stages that it may start from. Where settings leave it open, it is the last one that is finished,
            else the first.
        before: further stages that may start from this one, which do not name it themselves.
        inherits: groups of settings that the parent decides.
        has_model: whether it trains a model; else ``make_bundle`` is all of its work.
        from_scratch: whether its model begins with random weights, so that the plan follows from settings alone.
        trains_on_conversations: those of ``mixture``; else on the text of ``data``.
        trains_on_answers: whether its rows are answers that it writes itself, as settings of ``rl`` say.
        loss_mask: of conversations, where settings leave it open: which tokens the loss is taken of.
        validates_at_start: whether it validates before its first step, where settings leave it open.
        config_file: the file of configs/stage that it takes where there is none of its name: it chooses the schedule.
        next_step: what can be done with its result: words, and the command without the run.
    """

    name: str = ""
    parents: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    inherits: tuple[str, ...] = ("model", "tokenizer", "data")
    has_model = True
    from_scratch = False
    trains_on_conversations = False
    trains_on_answers = False
    loss_mask: LossMask = "assistant"
    validates_at_start = False
    config_file = "base"
    next_step = ("talk to it", "chat")

    @property
    def help(self) -> str:
        """One line: the first of the docstring."""
        return (inspect.getdoc(type(self)) or "").partition("\n")[0]

    @property
    def starts_from_model(self) -> bool:
        """Whether there has to be a parent, whose model it goes on with."""
        return self.has_model and not self.from_scratch

    def depends_on(self, keys: Set[str]) -> Set[str]:
        """Of the keys that what is learnt depends on (at the root, or groups) those that this stage's result
        depends on: what it inherits is its parent's."""
        decided = set(self.inherits) if self.starts_from_model else set()
        return keys - decided - self._unused_groups().keys()

    def _unused_groups(self) -> dict[str, str]:
        """Groups of settings that have no effect in this stage, and what they are for."""
        used = {
            "rl": ("stage=rl", self.trains_on_answers),
            "mixture": ("stages that train on conversations", self.trains_on_conversations),
        }
        return {group: whose for group, (whose, is_used) in used.items() if not is_used}

    def unused_keys(self) -> dict[tuple[str, ...], str]:
        """Beginnings of keys that have no effect in this stage, and what they are for."""
        unused: dict[tuple[str, ...], str] = {(f"{group}.",): whose for group, whose in self._unused_groups().items()}
        if self.from_scratch:
            unused[("stage.num_epochs=", "stage.warm_start=")] = "stages that start from a model"
        if self.starts_from_model:
            of_horizon = ("tokens_per_parameter=", "counted_parameters=", "optim.reference.")
            unused[of_horizon] = "stages that train from scratch"
        return unused

    def prepare(self, context: StageContext) -> StageData:
        """What it trains with; nothing is trained. All processes call it, the main one first."""
        raise NotImplementedError

    def make_bundle(self, config: TrainConfig, folder: StageFolder, cache: Path, corpus: RunCorpus) -> None:
        """The work of a stage without a model, on the main process: writes bundle and finished.json."""
        raise NotImplementedError


T = TypeVar("T", bound=type[Stage])
REGISTRY: Registry[Stage] = Registry(
    "stage",
    package="nanochat_pl.training.stages",
    group="nanochat_pl.stages",
    reserved=(*RESULTS, "doctor", "evaluate"),  # folders beside those of stages, and steps of a pipeline
)


def stage(name: str) -> Callable[[T], T]:
    """Register the class that stands under it as a stage.

    Raises:
        UserError: it is no name, or another class has it.
    """

    def entry_of(cls: T) -> Stage:
        cls.name = name
        return cls()

    return REGISTRY.register(name, entry_of)


def all_stages() -> dict[str, Stage]:
    """All stages by name, in the order in which a model goes through them; those of others at the end.

    Raises:
        UserError: a module that another package names cannot be imported, or its stage has a name that is taken.
    """
    stages = REGISTRY.load()
    order = [*(name for name in STAGES if name in stages), *sorted(stages.keys() - set(STAGES))]
    return {name: stages[name] for name in order}


def stage_named(name: str) -> Stage:
    """A stage by its name. Raises :class:`UserError` where there is none."""
    stages = all_stages()
    if name not in stages:
        raise UserError(f"name={name!r}: must be one of {', '.join(stages)}.")
    return stages[name]


def import_stage(target: str, key: str) -> Stage:
    """A stage by its class, ``package.module.Class``, which a user named; see :func:`import_class`.

    Raises:
        UserError: there is no such class, importing it fails, or it is no stage.
    """
    cls = import_class(target, key)
    found = next((each for each in all_stages().values() if type(each) is cls), None)
    if found is None:
        raise UserError(f"{key}={target!r}: is no stage: a class with @stage(NAME) above it is one.")
    return found


def stage_code(stage: Stage, method: str) -> contextlib.AbstractContextManager[None]:
    """Where a method of a stage is called: of one that is the user's its class is named with what it raises."""
    cls = type(stage)
    if cls.__module__.startswith("nanochat_pl."):
        return contextlib.nullcontext()
    return user_code(f"stage={cls.__module__}.{cls.__qualname__} fails in {method}")


def parents_of(stage: Stage) -> tuple[str, ...]:
    """The names of the stages that one may start from."""
    return (*stage.parents, *(each.name for each in all_stages().values() if stage.name in each.before))
