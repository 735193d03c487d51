"""Which stages there are: each names itself where its class is defined.

A stage is one file of this folder, of another package (which names its module as an entry point of the group
``nanochat_pl.stages``), or of the current folder: its class is then named as ``package.module.Class``::

    @stage("polish")
    class Polish(Sft): ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.import_class import import_class
from nanochat_pl.common.registry import Registry
from nanochat_pl.common.run_dir import RESULTS, STAGES
from nanochat_pl.training.stages.stage import Stage

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
    REGISTRY.check_name(name)

    def register(cls: T) -> T:
        cls.name = name
        REGISTRY.add(name, cls, cls())
        return cls

    return register


def all_stages() -> dict[str, Stage]:
    """All stages by name, in the order in which a model goes through them; those of others at the end.

    Raises:
        UserError: a module that another package names cannot be imported, or its stage has a name that is taken.
    """
    stages = REGISTRY.load()
    order = [*(name for name in STAGES if name in stages), *sorted(stages.keys() - set(STAGES))]
    return {name: stages[name] for name in order}


def stage_named(name: str, key: str = "name") -> Stage:
    """A stage by its name, or by its class as ``package.module.Class``, which is imported.

    Args:
        key: of the settings, for messages.

    Raises:
        UserError: there is no such stage, or its module cannot be imported.
    """
    if "." in name:
        cls = import_class(name, key)
        found = next((each for each in all_stages().values() if type(each) is cls), None)
        if found is None:
            raise UserError(
                f"{key}={name!r}: is no stage.", "Put @stage(NAME) of nanochat_pl.training.stages.registry above it."
            )
        return found
    stages = all_stages()
    if name not in stages:
        raise UserError(f"{key}={name!r}: must be one of {', '.join(stages)}.")
    return stages[name]


def parents_of(stage: Stage) -> tuple[str, ...]:
    """The names of the stages that one may start from."""
    return (*stage.parents, *(each.name for each in all_stages().values() if stage.name in each.before))
