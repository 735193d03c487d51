"""Settings of the config group ``mixture``: which tasks, how much of each, and what each may vary."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.settings import setting


@dataclass(frozen=True)
class TaskSettings:
    """What every task has."""

    size: int | None = setting(None, "Training conversations; null: as many as there are different ones.", at_least=1)
    repeat: int = setting(1, "How often each training conversation occurs in an epoch.", at_least=1)
    test_size: int = setting(200, "Held-out problems, or as many as there are.", at_least=1)


@dataclass(frozen=True)
class ArithmeticSettings(TaskSettings):
    """Two-operand arithmetic with the calculator: ``What is 12 + 7?``, or a story of one step."""

    size: int = setting(10_000, "Training conversations.", at_least=1)
    max_operand: int = setting(999, "Largest operand.", at_least=20, at_most=10**6)
    small_operand: int = setting(99, "Largest operand of the small problems.", at_least=20)
    small_share: float = setting(0.75, "Share of the small problems.", at_least=0, at_most=1)

    def __post_init__(self) -> None:
        if self.small_operand > self.max_operand:
            raise UserError(f"small_operand={self.small_operand}: is above max_operand={self.max_operand}.")


@dataclass(frozen=True)
class WordProblemSettings(ArithmeticSettings):
    """Stories of one step."""

    size: int = setting(4_000, "Training conversations.", at_least=1)


@dataclass(frozen=True)
class SpellingSettings(TaskSettings):
    """``Spell the word: apple``; words of the corpus."""

    min_letters: int = setting(3, "Shortest word.", at_least=1)
    max_letters: int = setting(12, "Longest word.", at_least=1, at_most=40)
    min_documents: int = setting(1, "In how many documents of python_docs a word must occur.", at_least=1)

    def __post_init__(self) -> None:
        if self.min_letters > self.max_letters:
            raise UserError(f"min_letters={self.min_letters}: is above max_letters={self.max_letters}.")


@dataclass(frozen=True)
class LetterCountingSettings(SpellingSettings):
    """``How many r are in strawberry?``; words of the corpus."""

    size: int | None = setting(6_000, "Training conversations; null: one for each word.", at_least=1)
    long_form: bool = setting(False, "Spell the word and walk through its letters before the tool is called.")


@dataclass(frozen=True)
class IdentitySettings(TaskSettings):
    """``Who are you?``"""

    repeat: int = setting(5, "How often each training conversation occurs in an epoch.", at_least=1)
    name: str = setting("nano", "What the model calls itself.", max_length=100)
    creator: str = setting("nanochat_pl", "What it says that it was made with, or by whom.", max_length=200)

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UserError(f"name={self.name!r}: must not be empty.")


@dataclass(frozen=True)
class DocumentationSettings(TaskSettings):
    """``What does `statistics.median` do?``; functions of the standard library."""

    functions: int = setting(400, "How many documented functions are asked about.", at_least=1)
    test_size: int = setting(300, "Functions asked about in a wording that training does not have.", at_least=1)
    max_chars: int = setting(80, "Longest summary line, in characters.", at_least=20)


@dataclass(frozen=True)
class ConversationSettings(TaskSettings):
    """Conversations out of files: parquet with a column of messages, JSON lines (also compressed), JSON."""

    path: str | None = setting(None, "File, folder (searched recursively) or glob: parquet, jsonl, json.")
    test_path: str | None = setting(None, "Files that are held out; then all of path is trained on.")
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
    start: int = setting(0, "Training conversations that are passed over, from the first.", at_least=0)
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


@dataclass(frozen=True)
class SmolTalkSettings(ConversationSettings):
    """SmolTalk in its version for small models: 460 thousand conversations."""

    repo: str | None = setting("HuggingFaceTB/smol-smoltalk", "Data set on the hub: OWNER/NAME.")


@dataclass(frozen=True)
class MixtureTasks:
    """One field per task; null, or not being named, leaves a task out. ``conversations`` holds any number by name."""

    arithmetic: ArithmeticSettings | None = None
    word_problems: WordProblemSettings | None = None
    spelling: SpellingSettings | None = None
    letter_counting: LetterCountingSettings | None = None
    identity: IdentitySettings | None = None
    documentation: DocumentationSettings | None = None
    smoltalk: SmolTalkSettings | None = None
    conversations: dict[str, ConversationSettings | None] = setting(
        factory=dict, doc="Conversations out of files, by a name of yours: conversations.NAME.path=…"
    )

    def __post_init__(self) -> None:
        problems = []
        for name in self.conversations:
            if not re.fullmatch(r"\w[\w-]{0,63}", name):
                problems.append(f"conversations.{name}: names have letters, digits, _ and -, 64 at most.")
            if name in _OWN_NAMES:
                problems.append(f"conversations.{name}: a task has that name; take another one.")
        if problems:
            raise UserError(problems)

    def chosen(self) -> dict[str, TaskSettings]:
        """The tasks that are not left out, in the order of the fields."""
        pairs: Mapping[str, TaskSettings | None] = {name: getattr(self, name) for name in _OWN_NAMES}
        return {name: settings for name, settings in {**pairs, **self.conversations}.items() if settings is not None}


_OWN_NAMES = [field.name for field in dataclasses.fields(MixtureTasks) if field.name != "conversations"]


def default_tasks() -> MixtureTasks:
    """All tasks that need nothing but this machine."""
    return MixtureTasks(
        ArithmeticSettings(),
        WordProblemSettings(),
        SpellingSettings(),
        LetterCountingSettings(),
        IdentitySettings(),
        DocumentationSettings(),
    )


@dataclass(frozen=True)
class MixtureSettings:
    """The conversations of a stage: tasks in one seeded order."""

    tasks: MixtureTasks = setting(factory=default_tasks, doc="The tasks by name, each with its settings.")
    seed: int = setting(0, "Seed of the order of the training conversations.", at_least=0)

    def __post_init__(self) -> None:
        if not self.tasks.chosen():
            raise UserError(
                f"tasks: no task is chosen; there are {', '.join(_OWN_NAMES)}, and files of your own: "
                "conversations.NAME.path=…"
            )
