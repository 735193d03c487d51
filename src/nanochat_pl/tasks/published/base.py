"""Tasks whose problems are rows of a published table: a data set of a hub, or files of the same columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import UserGlob, setting
from nanochat_pl.common.text_files import is_unicode
from nanochat_pl.data.cache.content_cache import fingerprint_of
from nanochat_pl.data.conversations.tables import Row, Rows
from nanochat_pl.tasks.base import Split, Task, TaskSettings, own_settings
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.published.table_files import table_files

# Conversations that a fingerprint looks at: enough to see a change of their form.
_FIRST = 16
_MAX_CHOICES = 26


@dataclass(frozen=True)
class TableSettings(TaskSettings):
    """Problems out of a table of the hub: fetched by nanochat-pl download, or found in paths.hub."""

    size: int | None = setting(None, "Training problems, from start on; null: all.", at_least=1)
    start: int = setting(0, "Training problems that are passed over, in the order of order_seed.", at_least=0)
    test_size: int = setting(100_000, "Held-out problems, or as many as there are.", at_least=1)
    repo: str = setting("", "Data set on the hub: OWNER/NAME.")
    revision: str | None = setting(None, "Branch, tag or commit of repo; null: main.")
    config: str = setting("", "Which part of repo: the folder of its tables.")
    train_split: str = setting("train", "Split of repo that is trained on.")
    test_split: str = setting("test", "Split of repo that is held out.")
    path: UserGlob | None = setting(
        None,
        "Files instead: file, folder or glob; parquet or JSON lines with the columns of repo. Those that are named for "
        "test_split are held out.",
    )
    test_path: UserGlob | None = setting(
        None, "Files to hold out instead: of a folder or glob those named for it, else all."
    )
    order_seed: int | None = setting(
        42,
        "Seed of the order of the rows, in which start, step and size count; null: that of the files.",
        at_least=0,
        at_most=2**32 - 1,
    )

    def __post_init__(self) -> None:
        problems = []
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.repo):
            problems.append(f"repo={self.repo!r}: is no data set's name, OWNER/NAME.")
        for key in ("config", "train_split", "test_split"):
            if not re.fullmatch(r"[\w-][\w.-]*", getattr(self, key)):
                problems.append(f"{key}={getattr(self, key)!r}: is no name of a part of a data set.")
        if self.train_split == self.test_split and None in (self.path, self.test_path):
            problems.append(f"test_split={self.test_split!r}: is trained on, as train_split says.")
        if problems:
            raise UserError(problems)

    @property
    def files(self) -> str:
        """Glob for the files of ``repo``: all splits of ``config``."""
        return f"{self.config}/*.parquet"


class TableTask(Task):
    """A task of a table's rows, in one seeded order.

    A row is looked at when its conversation is asked for; one that is no problem of this task raises a UserError that
    names file and row.
    """

    task_name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]] = ()  # that are read
    # Of multiple choice the column of the choices, and their key in it where it holds objects.
    choices: ClassVar[tuple[str, str | None] | None] = None

    def __init__(self, settings: TableSettings, split: Split, context: TaskContext) -> None:
        """Raises UserError: a file is missing, cannot be read, or lacks a column."""
        name, self.settings = self.task_name, settings
        self.where = f"{context.where}.{name}"
        self.files = table_files(name, self.where, settings, split, context)
        self._rows = Rows([file.path for file in self.files], self.columns)
        chosen = self.select(self._rows)
        order: Sequence[int] = range(len(chosen))
        if settings.order_seed is not None:
            order = np.random.default_rng(settings.order_seed).permutation(len(chosen)).tolist()
        start, size, step = settings.slice_of(split)
        order = order[start::step][:size]
        if not order:
            key = "start" if split == "train" else "test_start"
            raise UserError(f"{self.where}.{key}={start}: nothing of its {len(chosen):,} rows is left.")
        self._order = [chosen[number] for number in order]
        self._chosen = chosen
        super().__init__(name, split, len(self._order))
        if self.choices is not None:
            self.baseline = self._chance(*self.choices)

    @classmethod
    def from_settings(cls, settings: TableSettings, split: Split, context: TaskContext) -> Task:
        return cls(settings, split, context)

    def select(self, rows: Rows) -> Sequence[int]:
        """Which rows of the files, by number, belong to the task: all of them."""
        return range(len(rows))

    def row(self, index: int) -> Row:
        """The row of a conversation."""
        return self._rows[self._order[index]]

    def origin(self, index: int) -> str:
        """File and row, from 0, of a conversation."""
        file, place = self._rows.place(self._order[index])
        return f"{self.files[file].name}, row {place:,}"

    def bad_row(self, index: int, problem: str) -> UserError:
        """What is said of a row that is no problem of this task."""
        return UserError(f"{self.where}: {self.origin(index)}: {problem}", "Mend the row, or leave it out of the file.")

    def text(self, index: int, column: str) -> str:
        """The text in a column of a conversation's row. Raises UserError where it is none, or no Unicode."""
        value = self.row(index)[column]
        if not isinstance(value, str):
            raise self.bad_row(index, f"{column} is {type(value).__name__}, not text.")
        self._require_unicode(index, column, value)
        return value

    def texts(self, index: int, what: str, values: object) -> list[str]:
        """Values of a row that have to be texts, from two to 26. Raises UserError where they are not."""
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self.bad_row(index, f"{what} is no list of texts.")
        if not 2 <= len(values) <= _MAX_CHOICES:
            raise self.bad_row(index, f"{what} has {len(values):,} entries, not 2 … {_MAX_CHOICES}.")
        self._require_unicode(index, what, " ".join(values))
        return values

    def _require_unicode(self, index: int, what: str, text: str) -> None:
        if not is_unicode(text):
            raise self.bad_row(index, f"{what} holds half of a surrogate pair, which is no character.")

    def _chance(self, column: str, field: str | None) -> float:
        """Accuracy of guessing among the choices of each row: of the published table what is said of it.

        Of another the mean of one over the number of choices, over all rows of the part, so that no limit changes it.
        """
        if not self.files[0].given and self.settings.repo == type(self.settings)().repo:
            return type(self).baseline
        lengths = self._rows.lengths(column, field)[np.asarray(self._chosen)]
        lengths = lengths[(lengths >= 2) & (lengths <= _MAX_CHOICES)]  # others are refused when they are asked
        return float(np.mean(1 / lengths)) if len(lengths) else type(self).baseline

    @cached_property
    def fingerprint(self) -> str:
        """Of the files, of what is taken from them in which order, and of the form of the first conversations."""
        files = [file.sha256 for file in self.files]
        first = [self[index] for index in range(min(_FIRST, len(self)))]
        own = own_settings(self.settings, TableSettings)
        return fingerprint_of("table 1", self.name, self.split, files, own, self._order, first)
