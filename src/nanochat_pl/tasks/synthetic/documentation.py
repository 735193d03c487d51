"""What documented functions of the standard library do, in the words of their summary line."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nanochat_pl.common.schema import setting
from nanochat_pl.data.sources.docstrings import Docstring
from nanochat_pl.tasks.base import (
    Content,
    Conversation,
    Split,
    Task,
    TaskSettings,
    conversation_of,
    generator,
    is_held_out,
    limits,
    text_of,
)
from nanochat_pl.tasks.context import MIXTURE, TaskContext
from nanochat_pl.tasks.registry import task

QUESTIONS: dict[Split, tuple[str, ...]] = {
    "train": (
        "What does `{name}` do?",
        "what does {name} do",
        "Explain `{name}`.",
        "What is `{name}` for?",
        "Describe the function {name}.",
        "Tell me what {name} does.",
    ),
    "test": ("What is the purpose of `{name}`?", "Can you explain what {name} does?", "Summarise `{name}`."),
}
# Modules written in C, of which nothing is imported that is not in every Python.
_C_MODULES = (
    *("builtins", "binascii", "cmath", "collections", "functools", "gc", "itertools", "math", "sys", "time", "zlib"),
)
_C_TYPES = (bytes, dict, float, frozenset, int, list, set, str, tuple)
# Several names for the functions of os.path, and programs rather than functions.
_SKIPPED_MODULES = frozenset(("genericpath", "ntpath", "nturl2path", "posixpath"))
_SKIPPED_FUNCTIONS = frozenset(("main", "test", "usage"))
_MIN_CHARS = 15
_SIGNATURE = re.compile(r"->|^\w+\(")


@dataclass(frozen=True)
class DocumentationSettings(TaskSettings):
    """``What does `statistics.median` do?``; functions of the standard library."""

    functions: int = setting(400, "How many documented functions are asked about.", at_least=1)
    test_size: int = setting(300, "Functions asked about in a wording that training does not have.", at_least=1)
    max_chars: int = setting(80, "Longest summary line, in characters.", at_least=20)


@task("documentation", DocumentationSettings)
class Documentation(Task):
    """``What does `statistics.median` do?`` Right is the summary line, to the letter.

    Training and test part ask about the same functions; the wordings of the test part do not occur in training. It
    measures what was memorised and is found again behind another question. Functions whose summary line is held out, as
    documentation_choice does, are in neither part.
    """

    def __init__(
        self,
        settings: DocumentationSettings,
        split: Split,
        functions: Sequence[tuple[str, str]],
        where: str = MIXTURE,
    ) -> None:
        """
        Args:
            settings: of this task.
            split: which wordings.
            functions: (qualified name, summary line), see :func:`documented_functions`.
            where: the group that the task is a key of, for messages.
        """
        self.functions = in_teaching_order(functions)[: settings.functions]
        all_questions = len(self.functions) * len(QUESTIONS["train"])
        start, size, step = limits("documentation", settings, split, all_questions, len(self.functions), where)
        super().__init__("documentation", split, size, start, step)

    @classmethod
    def from_settings(cls, settings: DocumentationSettings, split: Split, context: TaskContext) -> Documentation:
        functions = documented_functions(context.corpus.stdlib_docstrings, settings.max_chars)
        return cls(settings, split, functions, context.where)

    def conversation(self, index: int) -> Conversation:
        questions = QUESTIONS[self.split]
        times_round, place = divmod(index, len(self.functions))
        name, summary = self.functions[place]
        # Each time round the functions, each is asked about in its next wording.
        wording = questions[(place + times_round) % len(questions)]
        return conversation_of(wording.format(name=name), summary)

    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        return text_of(answer).strip() == conversation["messages"][-1]["content"]


def in_teaching_order(functions: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """(Qualified name, summary line) in the order of which ``documentation`` teaches the first ones."""
    chosen = sorted(pair for pair in functions if not summary_held_out(pair[1]))
    generator("documentation").shuffle(chosen)
    return chosen


def summary_held_out(summary: str) -> bool:
    """Whether no task trains on a function's summary line."""
    return is_held_out("summary", summary)


def documented_functions(docstrings: Iterable[Docstring], max_chars: int) -> list[tuple[str, str]]:
    """Public functions with a summary line: those of the docstrings, and those that are written in C.

    Args:
        docstrings: of the standard library, read from its source.
        max_chars: longest summary line.

    Returns:
        (qualified name, summary line), sorted by name, each name once.
    """
    found: dict[str, str] = {}
    for name, text in (*_functions_in_c(), *_functions_in_python(docstrings)):
        summary = _summary(text)
        if summary and _MIN_CHARS <= len(summary) <= max_chars:
            found.setdefault(name, summary)
    return sorted(found.items())


def _functions_in_python(docstrings: Iterable[Docstring]) -> Iterator[tuple[str, str]]:
    for docstring in docstrings:
        parts = docstring.name.split(".")
        public = not any(part.startswith("_") for part in parts) and len(parts) <= 3
        known = docstring.package not in _SKIPPED_MODULES and parts[-1] not in _SKIPPED_FUNCTIONS
        if docstring.kind == "function" and public and known:
            yield docstring.name, docstring.text


def _functions_in_c() -> Iterator[tuple[str, str]]:
    for module_name in _C_MODULES:
        module = importlib.import_module(module_name)
        prefix = "" if module_name == "builtins" else f"{module_name}."
        for name, member in inspect.getmembers(module):
            # Of a hook that this process has replaced, as torch does for several processes, the one that it began with.
            value = getattr(sys, f"__{name}__", member) if name.endswith("hook") else member
            is_function = inspect.isbuiltin(value) or (inspect.isclass(value) and not issubclass(value, BaseException))
            # A module in C may have an underscore: functools.reduce is one of _functools.
            made_there = (getattr(value, "__module__", None) or "").lstrip("_") == module_name
            if is_function and made_there and not name.startswith("_"):
                yield prefix + name, inspect.getdoc(value) or ""
    for type_ in _C_TYPES:
        for name, value in inspect.getmembers(type_, inspect.ismethoddescriptor):
            if not name.startswith("_"):
                yield f"{type_.__name__}.{name}", inspect.getdoc(value) or ""


def _summary(text: str) -> str | None:
    """The first paragraph where it is one line of ASCII and no signature."""
    line, _, rest = text.partition("\n")
    one_line = not rest or rest.startswith("\n")
    return line if one_line and line.isascii() and not _SIGNATURE.search(line) else None
