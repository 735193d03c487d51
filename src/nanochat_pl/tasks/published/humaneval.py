"""HumanEval: functions to be written after their description, judged by running their tests in the sandbox.

Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code, arXiv 2107.03374.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import setting
from nanochat_pl.tasks.base import Content, Conversation, Split, conversation_of, text_of
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.published.base import TableSettings, TableTask
from nanochat_pl.tasks.registry import task
from nanochat_pl.tools.sandbox.sandbox import Sandbox
from nanochat_pl.tools.sandbox.settings import Check, Outcome, SandboxSettings

_FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
# A line, not indented, that is code and not prose.
_CODE = re.compile(
    r"from\s+[\w.]+\s+import\b|import\s+[\w., ]+$|(?:async\s+)?def\s+\w+\s*\(|class\s+\w+\s*[(:]|[#@)\]}'\"]"
    r"|(?:if|elif|else|for|while|with|try|except|finally)\b.*:\s*(?:#.*)?$|assert\b|[\w.]+\(.*\)\s*$"
    r"|[\w.,\[\] ]+[-+*/|&%]?=(?!=)"
)
_TRIPLE_QUOTE = re.compile(r"'''|\"\"\"")
_INDENT = 4


@dataclass(frozen=True)
class HumanEvalSettings(TableSettings):
    """164 functions to write in Python, judged by running their tests; for evaluation alone."""

    repo: str = setting("openai/openai_humaneval", "Data set on the hub: OWNER/NAME.")
    config: str = setting("openai_humaneval", "Which part of repo: the folder of its tables.")

    def __post_init__(self) -> None:
        super().__post_init__()
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        given = {key: getattr(self, key) for key in ("size", "start", "repeat", "train_split", "path")}
        if problems := [
            f"{key}={value!r}: has no meaning: there is no training part."
            for key, value in given.items()
            if value != fields[key]
        ]:
            raise UserError(problems)


@task("humaneval", HumanEvalSettings)
class HumanEval(TableTask):
    """The beginning of a function, and all of it as the answer. An answer is right if its function passes the tests.

    A conversation has ``task_id``, ``prompt``, ``entry_point`` and ``test`` besides its messages.
    """

    task_name = "humaneval"
    has_training_part = False
    columns = ("task_id", "prompt", "canonical_solution", "test", "entry_point")

    def __init__(self, settings: HumanEvalSettings, split: Split, context: TaskContext) -> None:
        """
        Raises:
            UserError: as for every table; it is to be trained on; an isolation layer of the sandbox is missing.
        """
        if split == "train":
            raise UserError(
                f"{context.where}.{self.task_name}: has no training part: it is for evaluation alone.",
                f"Leave it out: {context.where}.{self.task_name}=null",
            )
        super().__init__(settings, split, context)
        self.sandbox = Sandbox(context.sandbox or SandboxSettings())
        self.remark = self.sandbox.remark

    def conversation(self, index: int) -> Conversation:
        row = {column: self.text(index, column) for column in self.columns}
        if not row["entry_point"].isidentifier() or not _definition(row["entry_point"], row["prompt"]):
            raise self.bad_row(index, f"prompt does not define entry_point={row['entry_point']!r}.")
        solution = f"{row['prompt']}\n{row.pop('canonical_solution')}"
        return conversation_of(row["prompt"], solution) | row

    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        return self.evaluate_all([conversation], [answer])[0]

    def evaluate_all(self, conversations: Sequence[Conversation], answers: Sequence[Content]) -> list[bool]:
        return [outcome.passed for outcome in self.outcomes(conversations, answers)]

    def outcomes(self, conversations: Sequence[Conversation], answers: Sequence[Content]) -> list[Outcome]:
        """What became of each answer's program, several running at a time and equal ones once."""
        checks = [
            Check(
                program_of(text_of(answer), row["prompt"], row["entry_point"]),
                row["entry_point"],
                row["test"],
                trusted=row["prompt"],
            )
            for row, answer in zip(conversations, answers, strict=True)
        ]
        different = list(dict.fromkeys(checks))  # several samples of one problem may be one answer
        outcomes = dict(zip(different, self.sandbox.check_all(different), strict=True))
        return [outcomes[check] for check in checks]


def program_of(answer: str, prompt: str, entry_point: str) -> str:
    """The program that an answer means: what the prompt has before the function, and the function.

    An answer may be the function, with or without what is around it; a block of code between fences, the first that
    defines the function or else the first; or the function's body alone, which is put under the prompt. Nothing of it
    is parsed or run here.

    Args:
        answer: text of a model.
        prompt: the beginning of a program, up to the description of the function.
        entry_point: the function's name.
    """
    blocks = [textwrap.dedent(block) for block in _FENCED.findall(answer)]
    defining = [code for code in blocks if _definition(entry_point, code)]
    if not blocks and _definition(entry_point, answer):
        defining = [_without_prose(answer, entry_point)]
    if not defining:
        return f"{prompt.rstrip()}\n{_body(blocks[0] if blocks else answer)}\n"
    begin = _definition(entry_point, prompt)
    before = prompt[: begin.start()] if begin else ""
    return f"{before}\n{defining[0]}\n"


def _definition(entry_point: str, code: str) -> re.Match[str] | None:
    return re.search(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\s*\(", code, re.MULTILINE)


def _without_prose(text: str, entry_point: str) -> str:
    """A text from its first line of code to the first line behind the function that is none."""
    lines = text.split("\n")
    begin = next((number for number, line in enumerate(lines) if _CODE.match(line)), 0)
    kept: list[str] = []
    defined = in_quotes = False
    for line in lines[begin:]:
        is_prose = bool(line.strip()) and not line[0].isspace() and not _CODE.match(line)
        if defined and not in_quotes and is_prose:
            break
        defined = defined or bool(_definition(entry_point, line))
        in_quotes ^= len(_TRIPLE_QUOTE.findall(line)) % 2 == 1
        kept.append(line)
    return "\n".join(kept)


def _body(text: str) -> str:
    """The body of a function, indented: whatever its own indentation, and where that of its first line is lost."""
    lines = [line for line in text.expandtabs(_INDENT).split("\n") if line.strip()]
    if not lines:
        return ""
    lines[0] = " " * _lost_indent(lines) + lines[0]
    depth = _depth(lines[0])
    end = next((number for number, line in enumerate(lines) if _depth(line) < depth), len(lines))
    return textwrap.indent("\n".join(line[depth:] for line in lines[:end]), " " * _INDENT)


def _lost_indent(lines: Sequence[str]) -> int:
    """How far the first line is to be moved to stand where the others want it."""
    if len(lines) < 2 or _depth(lines[0]):
        return 0
    depth = min(map(_depth, lines[1:]))
    is_one_block = lines[0].rstrip().endswith(":") and _depth(lines[1]) == depth
    return max(0, depth - _INDENT) if is_one_block else depth


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())
