"""Things with a name that register themselves where they are defined: tasks, stages.

They are found in the modules of a package of ours, and in those that other packages name as entry points.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Collection
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from nanochat_pl.common.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """The registered things by name.

    Args:
        noun: what they are called in messages.
        package: ours, whose modules register some when they are imported.
        group: the entry points of other packages.
        reserved: names that none of them may have.
        left_out: modules of the package that are made of the registered things.
    """

    def __init__(
        self, noun: str, package: str, group: str, reserved: Collection[str], left_out: Collection[str] = ()
    ) -> None:
        self.noun, self.package, self.group = noun, package, group
        self.reserved, self.left_out = reserved, left_out
        self.entries: dict[str, T] = {}
        self.classes: dict[str, str] = {}
        self.loaded = False

    def check_name(self, name: str) -> None:
        """Raise :class:`UserError` for a name that none of them can have."""
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name) or name in self.reserved:
            raise UserError(
                f"{self.noun} {name!r}: a {self.noun}'s name has small letters, digits and _, and is not"
                f" {' or '.join(self.reserved)}."
            )

    def add(self, name: str, cls: type, entry: T) -> None:
        """Register an entry.

        Args:
            cls: the class that it is made of: again, where its module is imported a second time.

        Raises:
            UserError: another class has the name.
        """
        place = f"{cls.__module__}.{cls.__qualname__}"
        there = self.classes.setdefault(name, place)
        if there != place:
            raise UserError(f"{self.noun} {name!r}: there are two of that name, {there} and {place}.")
        self.entries[name] = entry

    def load(self) -> dict[str, T]:
        """All entries that are known, by name. The first call imports their modules.

        Raises:
            UserError: a module that another package names cannot be imported, or its entry has a name that is taken.
        """
        if not self.loaded:
            package = importlib.import_module(self.package)
            for module in pkgutil.walk_packages(package.__path__, f"{self.package}."):
                if module.name not in self.left_out:
                    importlib.import_module(module.name)
            self._load_entry_points()
            self.loaded = True
        return self.entries

    def _load_entry_points(self) -> None:
        for point in entry_points(group=self.group):
            origin = f"entry point {point.name} = {point.value}" + (f" of {point.dist.name}" if point.dist else "")
            try:
                point.load()
            except (ImportError, AttributeError, SyntaxError) as error:
                raise UserError(
                    f"{origin}: cannot be imported: {error}", "Mend that package, or uninstall it."
                ) from error
