"""Settings of the config group ``mixture``: which tasks, how much of each, and what each may vary."""

from __future__ import annotations

import dataclasses
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
class MixtureTasks:
    """One field per task; null, or not being named, leaves a task out."""

    arithmetic: ArithmeticSettings | None = None
    word_problems: WordProblemSettings | None = None
    spelling: SpellingSettings | None = None
    letter_counting: LetterCountingSettings | None = None
    identity: IdentitySettings | None = None
    documentation: DocumentationSettings | None = None

    def chosen(self) -> dict[str, TaskSettings]:
        """The tasks that are not left out, in the order of the fields."""
        pairs = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return {name: settings for name, settings in pairs if settings is not None}


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
            names = ", ".join(field.name for field in dataclasses.fields(self.tasks))
            raise UserError(f"tasks: no task is chosen; there are {names}.")
