"""Things with a name that register themselves where their class is defined: tasks, stages."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Collection
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.user_code import user_code

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """The registered things by name: those of a package of ours, and of modules that others name as entry points.

    Args:
        noun: what they are called in messages.
        package: ours.
        group: the entry points of other packages.
        reserved: names that none of them may have.
        left_out: modules of ours that are made of the registered things.
    """

    def __init__(
        self, noun: str, package: str, group: str, reserved: Collection[str], left_out: Collection[str] = ()
    ) -> None:
        self.noun, self.package, self.group = noun, package, group
        self.reserved, self.left_out = reserved, left_out
        self.entries: dict[str, T] = {}
        self.classes: dict[str, str] = {}
        self.loaded = False

    def register(self, name: str, entry_of: Callable[[C], T]) -> Callable[[C], C]:
        """The decorator of a class that registers what ``entry_of`` makes of it.

        Raises:
            UserError: it is no name, or another class has it.
        """
        if not is_name(name) or name in self.reserved:
            rule = f"a {self.noun}'s name has small letters, digits and _, and is not {' or '.join(self.reserved)}."
            raise UserError(f"{self.noun} {name!r}: {rule}")

        def register(cls: C) -> C:
            place = f"{cls.__module__}.{cls.__qualname__}"
            there = self.classes.setdefault(name, place)
            if there != place:
                raise UserError(f"{self.noun} {name!r}: there are two of that name, {there} and {place}.")
            self.entries[name] = entry_of(cls)
            return cls

        return register

    def load(self) -> dict[str, T]:
        """All that are known, by name. The first call imports their modules.

        Raises:
            UserError: a module that another package names cannot be imported, or a name in it is taken.
        """
        if not self.loaded:
            package = importlib.import_module(self.package)
            for module in pkgutil.walk_packages(package.__path__, f"{self.package}."):
                if module.name not in self.left_out:
                    importlib.import_module(module.name)
            for point in entry_points(group=self.group):
                origin = f"entry point {point.name} = {point.value}" + (f" of {point.dist.name}" if point.dist else "")
                with user_code(f"{origin}: cannot be imported (mend that package, or uninstall it)"):
                    point.load()
            self.loaded = True
        return self.entries


def is_name(text: str) -> bool:
    """Whether a registered thing can have this name."""
    return re.fullmatch(r"[a-z][a-z0-9_]{0,63}", text) is not None
