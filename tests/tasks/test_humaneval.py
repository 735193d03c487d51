"""HumanEval: which program an answer means, and that the sandbox judges it."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build
from nanochat_pl.tasks.base import Completion, Content, Conversation
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.published.humaneval import HumanEval, HumanEvalSettings, program_of
from nanochat_pl.tools.sandbox.sandbox import Sandbox
from nanochat_pl.tools.sandbox.settings import Check, Outcome, SandboxSettings
from tests.helpers.task_tables import opened, write_table

PROMPT = '''
from typing import List
import math


def half(x: float) -> float:
    return x / 2


def roots(xs: List[int]) -> List[float]:
    """ The square roots of halves.
    >>> roots([8])
    [2.0]
Those of numbers below zero are left out.
"""
'''
BODY = """    found = []
    for x in xs:
        if x >= 0:
            found.append(math.sqrt(half(x)))

    return found
"""
FULL = f"{PROMPT}\n{BODY}"
FUNCTION = FULL[FULL.index("def roots") :]
TESTS = "def check(candidate):\n    assert candidate([8, -1, 18]) == [2.0, 3.0]\n"
ROW = {"task_id": "t/0", "prompt": PROMPT, "canonical_solution": BODY, "test": TESTS, "entry_point": "roots"}


def works(answer: str) -> bool:
    """Whether an answer made of our own code above becomes a program that works."""
    names: dict[str, Any] = {}
    exec(compile(program_of(answer, PROMPT, "roots"), "program.py", "exec"), names)
    return bool(names["roots"]([8, -1, 18]) == [2.0, 3.0])


FORMS: dict[str, Callable[[str, str, str], str]] = {
    "whole": lambda whole, function, body: whole,
    "stripped": lambda whole, function, body: whole.strip(),
    "function alone": lambda whole, function, body: function,
    "with words around": lambda whole, function, body: f"Sure, it is:\n\n{whole}\n\nThis function loops.\nIt is done.",
    "fenced": lambda whole, function, body: f"Here:\n```python\n{whole}```\nIt works, as `f(1)` shows.",
    "fenced, indented": lambda whole, function, body: "1. So:\n" + textwrap.indent(f"```py\n{whole}\n```", "   "),
    "fence never closed": lambda whole, function, body: f"```\n{function}",
    "second fence": lambda whole, function, body: f"```\npip install x\n```\nthen\n```python\n{function}\n```",
    "used behind": lambda whole, function, body: f"{whole}\n\nif __name__ == '__main__':\n    print(1)\n",
    "body": lambda whole, function, body: body,
    "body, stripped": lambda whole, function, body: body.strip(),
    "body, not indented": lambda whole, function, body: textwrap.dedent(body),
    "body, fenced": lambda whole, function, body: f"```python\n{body}```",
    "body and words": lambda whole, function, body: f"{body}\nThis returns them.\n",
    "body and another function": lambda whole, function, body: f"{body}\n\ndef other():\n    return 1\n",
    "Windows": lambda whole, function, body: whole.replace("\n", "\r\n"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_program_is_found(form: str) -> None:
    assert works(FORMS[form](FULL, FUNCTION, BODY))


@pytest.mark.parametrize(
    ("body", "result"),
    [
        ("return xs", "    return xs"),
        ("for x in xs:\n    return x", "    for x in xs:\n        return x"),
        ("for x in xs:\n            return x\n        return 1", "    for x in xs:\n        return x\n    return 1"),
        ("if xs:\n        return 1", "    if xs:\n        return 1"),
        ("x = 1\n\treturn x", "    x = 1\n    return x"),
        ("", ""),
    ],
)
def test_bodies_are_indented(body: str, result: str) -> None:
    lines = [line for line in program_of(body, PROMPT, "roots").removeprefix(PROMPT.rstrip()).split("\n") if line]
    if body.startswith("for x in xs:\n            "):  # deeper than it has to be, and one function all the same
        compile("\n".join(["def f():", *lines]), "f", "exec")
    else:
        assert "\n".join(lines) == result


def test_words_are_no_program_and_do_no_harm() -> None:
    for answer in (
        "",
        "I don't know.",
        "```",
        "``````",
        "def",
        "def roots",
        "roots",
        "\ud800",
        "def roots(" + "(" * 10**5,
    ):
        assert program_of(answer, PROMPT, "roots").startswith("\nfrom typing import List")
    for answer in (
        "```x\n" * 30_000,
        "def roots(x):\n" + ":" * 10**5,
        "if" + " :" * 10**5,
        " " * 10**5 + "x",
        "(" * 10**5,
    ):
        program_of(answer, PROMPT, "roots")


def context(cache: Path, hub: Path | None = None) -> TaskContext:
    """With a strict sandbox where this machine allows it, else a weak one."""
    try:
        Sandbox(settings := SandboxSettings(seconds=60.0))
    except UserError:
        settings = SandboxSettings(mode="weak", seconds=60.0)
    return TaskContext(cache, hub=hub, sandbox=settings)


def task_of(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> HumanEval:
    path = str(write_table(tmp_path / "own.parquet", list(rows)))
    chosen = build(HumanEvalSettings, {"test_path": path, "order_seed": None, **settings})
    return cast(HumanEval, HumanEval.from_settings(chosen, "test", context(tmp_path)))


def test_answers_are_judged_by_the_tests(tmp_path: Path) -> None:
    task = task_of(tmp_path, ROW)
    conversation = task[0]
    assert conversation["messages"][0]["content"] == PROMPT and conversation["messages"][1]["content"] == FULL
    assert {key: conversation[key] for key in ("task_id", "entry_point", "test")}.items() <= ROW.items()
    wrong = FULL.replace("x >= 0", "x > 9")
    raising = f"{FUNCTION}\n    raise SystemExit(0)\n".replace("found = []", "raise SystemExit(0)")
    answers: list[Content] = [
        FULL,
        [{"type": "text", "text": BODY}],
        wrong,
        raising,
        "",
        [{"type": "python", "text": FULL}],
    ]
    assert task.evaluate_all([conversation] * len(answers), answers) == [True, True, False, False, False, False]
    assert task.evaluate(conversation, FULL) and task.reward(conversation, Completion(wrong)) == 0.0
    outcomes = task.outcomes([conversation] * 2, [wrong, FULL])
    assert [outcome.reason for outcome in outcomes] == ["failed", "passed"]
    assert (task.kind, task.baseline) == ("generative", 0.0)


def test_equal_answers_are_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(tmp_path, ROW, ROW | {"test": "def check(f): pass"})
    judge, ran = task.sandbox.check_all, []

    def counted(checks: list[Check]) -> list[Outcome]:
        ran.extend(checks)
        return judge(checks)

    monkeypatch.setattr(task.sandbox, "check_all", counted)
    conversations = [task[0], task[0], task[1], task[0]]
    assert task.evaluate_all(conversations, [FULL, "", "", FULL]) == [True, False, True, True]
    assert len(ran) == 3, "of two problems, one answered in two ways"


def test_a_weak_sandbox_is_said_with_the_score(tmp_path: Path) -> None:
    path = str(write_table(tmp_path / "own.parquet", [ROW]))
    settings = build(HumanEvalSettings, {"test_path": path})
    weak = TaskContext(tmp_path, sandbox=SandboxSettings(mode="weak"))
    task = HumanEval.from_settings(settings, "test", weak)
    assert task.remark is not None and task.remark.startswith("sandbox=weak: no ")


def test_it_is_never_trained_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"humaneval: has no training part[^$]*mixture.tasks.humaneval=null"):
        opened("humaneval", "train", tmp_path)
    with pytest.raises(UserError, match=r"size=3: has no meaning[^$]*path='a': has no meaning"):
        build(HumanEvalSettings, {"size": 3, "path": "a"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"entry_point": "other"}, "prompt does not define entry_point='other'"),
        ({"entry_point": "a b"}, "prompt does not define entry_point='a b'"),
        ({"test": None}, "test is NoneType, not text"),
    ],
)
def test_rows_that_are_no_problems_are_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"mixture.tasks.humaneval: own.parquet, row 0: {said}"):
        task_of(tmp_path, ROW | change)[0]


def broken(conversation: Conversation) -> str:
    """The solution with its function wrapped so that it returns what no test expects."""
    name = conversation["entry_point"]
    wrapper = f"def wrapped(function):\n    return lambda *_, **__: 'a sentinel'\n\n\n{name} = wrapped({name})"
    return f"```python\n{conversation['messages'][1]['content']}\n\n\n{wrapper}\n```"


def real(shared: Path, tmp_path: Path) -> tuple[HumanEval, list[Conversation]]:
    task = HumanEval.from_settings(HumanEvalSettings(), "test", context(tmp_path, shared / "data/hub"))
    assert len(task) == 164
    return cast(HumanEval, task), [task[index] for index in range(len(task))]


def test_some_real_solutions_pass_and_their_broken_versions_fail(shared: Path, tmp_path: Path) -> None:
    task, conversations = real(shared, tmp_path)
    # Helpers in the prompt that tests use, a test that calls the function by its name, a prompt that begins with text.
    chosen = [each for each in conversations if each["task_id"] in {f"HumanEval/{n}" for n in (32, 33, 38, 64)}]
    answers = [each["messages"][1]["content"] for each in chosen]
    assert len(chosen) == 4 and task.evaluate_all(chosen, answers) == [True] * 4
    assert task.evaluate_all(chosen, [broken(each) for each in chosen]) == [False] * 4


@pytest.mark.slow
def test_all_real_solutions_pass_and_all_broken_versions_fail(shared: Path, tmp_path: Path) -> None:
    task, conversations = real(shared, tmp_path)
    passed = task.evaluate_all(conversations, [each["messages"][1]["content"] for each in conversations])
    assert [each["task_id"] for each, right in zip(conversations, passed, strict=True) if not right] == []
    passed = task.evaluate_all(conversations, [broken(each) for each in conversations])
    assert [each["task_id"] for each, right in zip(conversations, passed, strict=True) if right] == []


@pytest.mark.slow
def test_real_solutions_in_all_forms(shared: Path, tmp_path: Path) -> None:
    """Each solution in one of the forms that answers come in, and the forms in turn."""
    task, conversations = real(shared, tmp_path)
    forms, answers = [*FORMS], []
    for number, each in enumerate(conversations):
        solution = each["messages"][1]["content"]
        body = solution.removeprefix(f"{each['prompt']}\n")
        begin = re.search(rf"^def {each['entry_point']}\b", solution, re.MULTILINE)
        assert begin is not None
        answers.append(FORMS[forms[number % len(forms)]](solution, solution[begin.start() :], body))
    outcomes = task.outcomes(conversations, answers)
    assert [
        (each["task_id"], outcome) for each, outcome in zip(conversations, outcomes, strict=True) if not outcome.passed
    ] == []
