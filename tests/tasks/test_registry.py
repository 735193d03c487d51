"""Which tasks there are: what may be registered, what other packages add, and what a task promises by itself."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build
from nanochat_pl.tasks import registry
from nanochat_pl.tasks.base import Completion, Content, Conversation, Task, TaskSettings, conversation_of, limits
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.mixture import build_tasks
from nanochat_pl.tasks.registry import TaskKind, all_tasks, kind_of, task
from nanochat_pl.tasks.settings import MixtureTasks


class Echo(Task):
    """Right is whatever was asked."""

    def __init__(self, settings: TaskSettings, split: str) -> None:
        super().__init__("echo", split, 3)  # type: ignore[arg-type]

    def conversation(self, index: int) -> Conversation:
        return conversation_of(str(index), str(index))

    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        return answer == conversation["messages"][-1]["content"]


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> dict[str, TaskKind]:
    """The registry's own dictionary, as it was again afterwards."""
    found = dict(all_tasks())
    monkeypatch.setattr(registry.TASKS, "entries", found)
    monkeypatch.setattr(registry.TASKS, "loaded", False)
    return found


def test_all_tasks_of_the_package_are_there() -> None:
    expected = {
        *("arithmetic", "word_problems", "spelling", "simple_spelling", "letter_counting", "spelling_bee", "identity"),
        *("documentation", "documentation_choice", "out_of_scope", "smoltalk"),
        *("sorting", "reversing", "three_operands", "early_stop"),
        *("mmlu", "arc_easy", "arc_challenge", "gsm8k", "humaneval"),
    }
    assert expected <= set(all_tasks()) and list(all_tasks()) == sorted(all_tasks())
    assert kind_of("mine") is None
    for name, kind in all_tasks().items():
        assert kind.name == name and (kind.settings.__doc__ or "").strip(), "--help shows what it says of itself"
        assert kind.settings() == build(kind.settings, {}), "every key has a default"
        assert issubclass(kind.settings, TaskSettings) and issubclass(kind.cls, Task)


def test_tasks_are_imported_when_they_are_asked_for() -> None:
    program = (
        "import sys, nanochat_pl.tasks, nanochat_pl.tasks.registry as r\n"
        "assert not any(m.endswith('.arithmetic') for m in sys.modules)\n"
        "r.all_tasks()\n"
        "assert any(m.endswith('.arithmetic') for m in sys.modules)\n"
        "import nanochat_pl.tasks.settings as s\n"
        "assert set(r.all_tasks()) < set(s.MixtureTasks.__dataclass_fields__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_are_keys_and_each_has_one_task(kinds: dict[str, TaskKind]) -> None:
    for name in ("Capitals", "my-task", "1st", "", "a.b", "conversations"):
        with pytest.raises(UserError, match="a task's name has small letters"):
            task(name, TaskSettings)
    task("echo", TaskSettings)(Echo)
    task("echo", TaskSettings)(Echo)  # its module was imported again
    assert kinds["echo"].cls is Echo
    with pytest.raises(UserError, match=r"task 'arithmetic': there are two of that name, nanochat_pl\.tasks\.synth"):
        task("arithmetic", TaskSettings)(Echo)


def test_other_packages_add_tasks(kinds: dict[str, TaskKind], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_task.py").write_text(
        "from nanochat_pl.tasks.registry import task\n"
        "from tests.tasks.test_registry import Echo, TaskSettings\n"
        "task('foreign', TaskSettings)(type('Foreign', (Echo,), {}))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("foreign", "foreign_task", registry.TASKS.group)]
    monkeypatch.setattr("nanochat_pl.common.registry.entry_points", lambda group: points)
    assert "foreign" in all_tasks.__wrapped__() and "foreign" not in all_tasks()
    registry.TASKS.loaded = False
    points.append(EntryPoint("lost", "no_such_module_at_all", registry.TASKS.group))
    with pytest.raises(UserError, match=r"entry point lost = no_such_module_at_all.*cannot be imported"):
        all_tasks.__wrapped__()


def test_what_a_task_has_by_itself() -> None:
    echo = Echo.from_settings(TaskSettings(), "test", TaskContext(Path()))
    assert echo.evaluate_all(list(echo), ["0", "9", "2"]) == [True, False, True]
    assert (echo.reward(echo[1], Completion("1")), echo.reward(echo[1], Completion("2"))) == (1.0, 0.0)
    assert (echo.kind, echo.baseline, echo.remark, echo.judged) == ("generative", 0.0, None, True)
    with pytest.raises(ValueError, match="zip"):
        echo.evaluate_all(list(echo), ["0"])
    with pytest.raises(TypeError, match="no categorical task"):
        echo.letters(echo[0])


@pytest.mark.parametrize(
    ("keys", "split", "sizes", "expected"),
    [
        ({}, "train", (30, 5), (0, 30, 1)),
        ({"start": 10}, "train", (30, 5), (10, 20, 1)),
        ({"start": 10, "size": 50}, "train", (30, 5), (10, 50, 1)),
        ({"start": 10, "size": 50}, "train", (None, None), (10, 50, 1)),
        ({"start": 10, "size": 50, "step": 2}, "test", (30, 5), (0, 5, 1)),
        ({"test_size": 3}, "test", (30, 5), (0, 3, 1)),
        ({"test_size": 3}, "test", (None, None), (0, 3, 1)),
        ({"step": 4}, "train", (30, 5), (0, 8, 4)),
        ({"start": 29, "step": 4}, "train", (30, 5), (29, 1, 4)),
        ({"start": 1, "step": 4, "size": 7}, "train", (30, 5), (1, 7, 4)),
        ({"step": 4, "size": 50}, "train", (None, None), (0, 50, 4)),
        ({"test_start": 1, "test_step": 2, "test_size": 9}, "test", (30, 5), (1, 2, 2)),
        ({"test_start": 1, "test_step": 2, "test_size": 9}, "test", (None, None), (1, 9, 2)),
        ({"test_start": 1, "test_step": 2}, "train", (30, 5), (0, 30, 1)),
    ],
)
def test_limits(keys: dict, split: str, sizes: tuple, expected: tuple[int, int, int]) -> None:
    assert limits("echo", build(TaskSettings, keys), split, *sizes) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "split", "said"),
    [
        ({"start": 30}, "train", r"mixture\.tasks\.echo\.start=30: passes over all 30 training conversations"),
        ({"test_start": 5}, "test", r"mixture\.tasks\.echo\.test_start=5: passes over all 5 held-out problems"),
        ({"step": 4, "size": 9}, "train", r"size=9: start=0 and step=4 leave 8 of 30 training"),
    ],
)
def test_limits_that_leave_nothing(keys: dict, split: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        limits("echo", build(TaskSettings, keys), split, 30, 5)  # type: ignore[arg-type]


def test_fingerprint_of_a_large_task_that_says_what_it_is_made_of_looks_at_some_of_it() -> None:
    @dataclass
    class Large(Echo):
        size: int
        form: str = "{}"
        says: bool = True

        def __post_init__(self) -> None:
            Task.__init__(self, "large", "train", self.size)

        def made_of(self) -> list[str] | None:
            return [] if self.says else None

        def conversation(self, index: int) -> Conversation:
            asked.append(index)
            return conversation_of(self.form.format(index), "x")

    asked: list[int] = []
    prints = {Large(100_001).fingerprint, Large(100_002).fingerprint, Large(100_001, "{}.").fingerprint}
    assert len(prints) == 3 and len(asked) <= 3 * 20_000 and max(asked) > 99_000
    assert Large(100_001).fingerprint in prints
    assert Large(0).fingerprint
    asked.clear()
    assert Large(100_001, says=False).fingerprint and asked == list(range(100_001)), "else at all of it"


def test_problems_of_all_tasks_are_said_together(tmp_path: Path) -> None:
    wanted = {"smoltalk": {}, "gsm8k": {}, "conversations": {"mine": {"path": "nowhere.jsonl"}}, "identity": {}}
    with pytest.raises(UserError) as error:
        build_tasks(build(MixtureTasks, wanted), "train", TaskContext(tmp_path))
    problems = "\n".join(error.value.problems)
    assert "smol-smoltalk" in problems and "gsm8k" in problems and "nowhere.jsonl" in problems
    assert "data.repo=HuggingFaceTB/smol-smoltalk" in error.value.fix and "task=gsm8k" in error.value.fix
