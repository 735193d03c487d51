"""Conversations that others have written: a data set of a hub, or files of the user's own."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nanochat_pl.common.console import progress
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import UserGlob, setting
from nanochat_pl.data.cache.content_cache import fingerprint_of
from nanochat_pl.data.conversations.files import CONVERSATION_SUFFIXES, ConversationFile, read_conversations
from nanochat_pl.data.conversations.validate import Audit
from nanochat_pl.data.files.folder import find_files
from nanochat_pl.data.files.split_names import configurations_remark, split_files, unused_remark
from nanochat_pl.data.sources.local import copies_of_files
from nanochat_pl.tasks.base import Content, Conversation, Split, Task, TaskSettings
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.published.dataset_files import (
    HubSet,
    SetFile,
    files_of_set,
    files_on_disk,
    require_all,
    set_files,
)
from nanochat_pl.tasks.registry import CONVERSATIONS, task


@dataclass(frozen=True)
class ConversationSettings(TaskSettings):
    """Conversations out of files: parquet with a column of messages, JSON lines (also compressed), JSON."""

    path: UserGlob | None = setting(None, "File, folder (searched recursively) or glob: parquet, jsonl, json.")
    test_path: UserGlob | None = setting(None, "Files that are held out; then all of path is trained on.")
    repo: str | None = setting(None, "Data set on the hub instead: OWNER/NAME. nanochat-pl download fetches it.")
    revision: str | None = setting(None, "Branch, tag or commit of repo; null: main.")
    files: str | None = setting(None, "Glob for the files of repo; null: all.")
    column: str = setting("messages", "Column of parquet files, key of JSON objects, that holds the messages.")
    test_fraction: float = setting(
        0.05,
        "Share held out by a hash of the conversation, where no file is named for it (test, validation).",
        above=0,
        at_most=0.5,
    )
    size: int | None = setting(None, "Training conversations, from there on; null: all.", at_least=1)
    test_size: int = setting(25_000, "Held-out conversations, or as many as there are.", at_least=1)

    def __post_init__(self) -> None:
        problems = []
        if (self.path is None) == (self.repo is None):
            problems.append("path: say where the conversations are: path=FILE, FOLDER or GLOB, or repo=OWNER/NAME.")
        if self.repo is not None and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.repo):
            problems.append(f"repo={self.repo!r}: is no data set's name, OWNER/NAME.")
        for key, needed in (("test_path", "path"), ("revision", "repo"), ("files", "repo")):
            if getattr(self, key) is not None and getattr(self, needed) is None:
                problems.append(f"{key}={getattr(self, key)!r}: has no meaning without {needed}.")
        if problems:
            raise UserError(problems)


class ConversationSet(Task):
    """The conversations of some files, in the order of the files.

    Which are held out: those of the files that are named for it (``test_path``; else ``validation-00000`` and the
    like, or ``test`` where there is no validation). Without such files a hash of each conversation tells, so copies of
    a conversation stay on one side, and other files change nothing for it.

    Attributes:
        audit: what was found in the rows of all files, those of the other split too.
    """

    group = f"{CONVERSATIONS}."  # the key, within the tasks, that its name stands under
    judged = False  # there are many right answers
    can_be_joined = False  # they have turns of their own, may begin with the system's message or end with the user's

    def __init__(self, name: str, settings: ConversationSettings, split: Split, context: TaskContext) -> None:
        """
        Args:
            context: folders, and the share of bad rows that is put up with.

        Raises:
            UserError: there are no such files, one cannot be read, too many rows are bad, or nothing is left.
        """
        where = f"{context.where}.{self.group}{name}"
        train, test, self._remarks = _find(where, settings, context)
        self._where, self._num_train_files = where, len(train)
        self._by_hash = train == test
        self.files = _read(name, train if self._by_hash else [*train, *test], settings.column, context.cache_dir)
        self.audit = Audit()
        for file in self.files:
            self.audit.add(file.audit, f"{file.name}, ")
        _require_good(where, self.audit, context.max_bad_fraction)
        self._held_out = _share_held_out(where, self.files, settings.test_fraction) if self._by_hash else None
        self._indices = self._choose(split)
        start, size, step = settings.slice_of(split)
        self._indices = _slice(self._indices, start, size, step)
        super().__init__(name, split, sum(map(len, self._indices)))
        if not len(self):
            raise UserError(
                f"{where}: nothing of its {self.audit.rows:,} rows is left for the {split} part.",
                f"Look at {where}.{'start' if split == 'train' else 'test_start'} and at what its files hold.",
            )
        self._ends = np.cumsum([len(indices) for indices in self._indices])
        self._limits = (start, size) if step == 1 else (start, size, step)

    def _choose(self, split: Split) -> list[np.ndarray]:
        """For each file the conversations of a split."""
        if self._held_out is not None:
            return [np.flatnonzero((file.places <= self._held_out) == (split == "test")) for file in self.files]
        first, all_files = self._num_train_files, len(self.files)
        wanted = range(first) if split == "train" else range(first, all_files)
        return [np.arange(len(file) if number in wanted else 0) for number, file in enumerate(self.files)]

    def uses(self) -> Iterator[_Use]:
        """What is done with each file in which there is a conversation."""
        for number, file in enumerate(self.files):
            held_out = float(number >= self._num_train_files) if self._held_out is None else self._held_out
            if file.contents:
                yield _Use(self._where, file.name, file.contents, held_out)

    def conversation(self, index: int) -> Conversation:
        file, number = self._locate(index)
        return file[number]

    def origin(self, index: int) -> tuple[str, int]:
        """File and row of a conversation: a line's number from 1, a table's row from 0."""
        file, number = self._locate(index)
        return file.name, file.row_number(number)

    def _locate(self, index: int) -> tuple[ConversationFile, int]:
        file = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[file - 1]) if file else 0
        return self.files[file], int(self._indices[file][index - before])

    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        raise UserError(f"{self.name}: conversation data sets have no ground-truth answers.")

    @cached_property
    def fingerprint(self) -> str:
        """Of the files and of what is taken from them; no conversation is read for it."""
        files = [file.fingerprint for file in self.files]
        return fingerprint_of(
            "conversations 1", files, self.split, self._held_out, [len(i) for i in self._indices], self._limits
        )

    def describe(self) -> list[str]:
        """Lines for people: what there is, what is held out by which rule, and what was left out or changed."""
        if self._held_out is None:
            rule = f"of {self.audit.rows:,} rows"
        else:
            num_held_out = sum(np.count_nonzero(file.places <= self._held_out) for file in self.files)
            rule = f"{num_held_out:,} of {sum(map(len, self.files)):,} held out, chosen by a hash of each"
        lines = [f"{self.name}: {len(self):,} conversations to train on, {rule}."]
        if self.audit.num_bad:
            causes = ", ".join(f"{count:,} {cause}" for cause, count in self.audit.bad.items())
            first = next(line for lines in self.audit.examples.values() for line in lines)
            lines.append(f"{self.name}: {self.audit.num_bad:,} bad rows are left out ({causes}; the first: {first})")
        trained_on = [(use.contents, use.file) for use in self.uses() if use.held_out < 1]
        lines += [f"{self.name}: {line}" for line in copies_of_files(trained_on)]
        audit = self.audit
        lines += [f"{self.name}: {count:,} rows are read as {form}." for form, count in audit.forms.items()]
        if audit.unread:
            keys = ", ".join(f"{key} ({count:,} rows)" for key, count in sorted(audit.unread.items()))
            lines.append(f"{self.name}: keys that are not read: {keys}.")
        return lines + [f"{self.name}: {line}." for line in self.losses()]

    @property
    def key(self) -> str:
        """The key that its settings stand under."""
        return self._where

    def losses(self) -> list[str]:
        """What of the files is not learnt though it might have been meant to be: a line for each."""
        return [*self._remarks, *(f"{count:,} rows: {change}" for change, count in self.audit.changed.items())]


@dataclass(frozen=True)
class SmolTalkSettings(ConversationSettings):
    """SmolTalk in its version for small models: 460 thousand conversations."""

    repo: str | None = setting("HuggingFaceTB/smol-smoltalk", "Data set on the hub: OWNER/NAME.")


@task("smoltalk", SmolTalkSettings)
class SmolTalk(ConversationSet):
    """SmolTalk."""

    group = ""

    @classmethod
    def from_settings(cls, settings: SmolTalkSettings, split: Split, context: TaskContext) -> SmolTalk:
        return cls("smoltalk", settings, split, context)


@dataclass(frozen=True)
class _Use:
    """Which share of a file's conversations, known by their hash, is held out: 0 none, 1 all, else a hash tells."""

    where: str
    file: str
    contents: str
    held_out: float

    def __str__(self) -> str:
        share = {0.0: "none", 1.0: "all"}.get(self.held_out, f"a share of {self.held_out:.4g}")
        return f"{self.file} of {self.where} ({share} of it held out)"


def refuse_shared_conversations(sets: Iterable[ConversationSet]) -> None:
    """Refuse files with the same conversations that are not all split by the same rule, in one set or in several.

    Raises:
        UserError: what is held out of one would be trained on.
    """
    seen: dict[str, _Use] = {}
    for use in (use for conversations in sets for use in conversations.uses()):
        first = seen.setdefault(use.contents, use)
        if first.held_out != use.held_out:
            raise UserError(
                f"{use} has the same conversations as {first}: what is held out of one would be trained on.",
                "Leave it to one of them, or give both the same test_fraction and no test_path.",
            )


def _find(
    where: str, settings: ConversationSettings, context: TaskContext
) -> tuple[list[SetFile], list[SetFile], list[str]]:
    """The files to train on and those to hold out; the same ones twice where a hash is to tell. And what is to be said
    of others."""
    remarks: list[str] = []
    wanted = HubSet(str(settings.repo), settings.revision, settings.files)
    if settings.repo is None:
        on_disk = find_files(f"{where}.path", str(settings.path), CONVERSATION_SUFFIXES)
        remarks += on_disk.remarks()
        found = set_files(on_disk)
    else:
        found = files_of_set(where, wanted, CONVERSATION_SUFFIXES, context)
    if settings.test_path is not None:
        test = files_on_disk(f"{where}.test_path", settings.test_path, CONVERSATION_SUFFIXES)
        if shared := {str(file.path) for file in found} & {str(file.path) for file in test}:
            raise UserError(f"{where}.test_path={settings.test_path!r}: {min(shared)} is under {where}.path too.")
        return found, test, remarks
    split = split_files(found, lambda file: file.name)
    train, held_out = (split.train, split.held_out) if split else (found, found)
    one = f"{where}.files='{{}}/*'" if settings.repo else f"{where}.path=…/{{}}"
    remarks += configurations_remark([file.name for file in train], one)
    remarks += unused_remark([file.name for file in split.unused] if split else [])
    require_all(where, [*train, *held_out], wanted, context)
    return train, held_out, remarks


def _read(name: str, found: Sequence[SetFile], column: str, cache_dir: Path) -> list[ConversationFile]:
    files = []
    with progress(f"reading {name}", len(found), "files") as advance:
        for file in found:
            assert file.path is not None, "files that are not here have been refused"
            files.append(read_conversations(file.name, file.path, column, cache_dir, file.at_rest))
            advance(1)
    return files


def _require_good(where: str, audit: Audit, max_bad_fraction: float) -> None:
    """Refuse files of which too much is bad, or that hold nothing."""
    if audit.rows == 0:
        raise UserError(f"{where}: its files hold no conversation.")
    if audit.num_bad <= max_bad_fraction * audit.rows:
        return
    if audit.num_bad == 1:
        problem, what = f"{where}: {next(iter(audit.examples.values()))[0]}", "the row"
    else:
        lines = [
            f"{where}: {audit.num_bad:,} of {audit.rows:,} rows are bad, {audit.num_bad / audit.rows:.2%}; "
            f"data.max_bad_fraction={max_bad_fraction:g} allows {max_bad_fraction:.2%}."
        ]
        for cause, count in audit.bad.items():
            lines.append(f"  {count:,} × {cause}:")
            lines += [f"    {line}" for line in audit.examples[cause]]
        problem, what = "\n".join(lines), "the files"
    enough = math.ceil(100 * audit.num_bad / audit.rows) / 100
    left_out = f"; or data.max_bad_fraction={enough:g} leaves such rows out" if audit.num_bad < audit.rows else ""
    raise UserError(problem, f"Fix {what}{left_out}. The forms that are read: docs/data.md.")


def _share_held_out(where: str, files: Sequence[ConversationFile], fraction: float) -> float:
    """The share asked for; of a handful of conversations enough to hold out one and little enough to keep one."""
    places = np.unique(np.concatenate([file.places for file in files]))
    if len(places) < 2:
        raise UserError(
            f"{where}: different conversations: {len(places)}; one is held out, another trained on.",
            f"Add some, or say what is held out: {where}.test_path=….",
        )
    return float(min(max(fraction, places[0]), places[-2]))


def _slice(indices: list[np.ndarray], start: int, size: int | None, step: int) -> list[np.ndarray]:
    """The conversations start, start + step … of all files together, ``size`` of them or all."""
    end = sum(map(len, indices)) if size is None else start + size * step
    result, before = [], 0
    for each in indices:
        first = start - before if before <= start else (start - before) % step
        result.append(each[first : max(0, end - before) : step])
        before += len(each)
    return result
