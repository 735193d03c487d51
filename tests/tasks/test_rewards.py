"""What answers are worth in reinforcement learning: which tasks have a reward, its parts, and odd answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build
from nanochat_pl.tasks.base import Completion, Content, Task, reference_of, text_of
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.mixture import build_tasks, only_judged
from nanochat_pl.tasks.registry import all_tasks, tasks_with_reward
from nanochat_pl.tasks.settings import MixtureSettings, MixtureTasks
from nanochat_pl.tasks.synthetic.early_stop import EarlyStop, EarlyStopSettings
from nanochat_pl.tasks.synthetic.reversing import Reversing, ReversingSettings
from nanochat_pl.tasks.synthetic.sorting import Sorting, SortingSettings
from nanochat_pl.tasks.synthetic.spelling import Spelling, SpellingSettings
from nanochat_pl.tasks.synthetic.three_operands import ThreeOperands, ThreeOperandsSettings
from nanochat_pl.tools.calculator import evaluate
from nanochat_pl.training.rl.prompts import Prompt
from nanochat_pl.training.rl.rewards import Rewards
from tests.tasks.test_tasks import WORDS, make, question

ROOT = Path(__file__).resolve().parents[2]
ODD: tuple[Content, ...] = (
    "",
    " \n\t",
    "٣ ٤ ٥",
    "१२",
    "²³ ½ ①",
    "9" * 5_000,
    "-" * 300 + "1." + "0" * 300,
    "1e999 nan inf",
    "<|output_start|>",
    "\x00\ud7ff\U0010ffff İß",
    [],
    [{"type": "python", "text": "1+"}],
    [{"type": "python_output", "text": "9" * 5_000}, {"type": "text", "text": "9" * 5_000}],
    [{"type": "python_output", "text": ""}, {"type": "text", "text": ""}],
)


def reward(task: Task, index: int, content: Content, **keys: Any) -> float:
    return task.reward(task[index], Completion(content, **keys))


def test_tasks_say_whether_they_have_a_reward() -> None:
    """By the class, for messages, and by the task, alike."""
    rewarded = tasks_with_reward()
    new = {"sorting", "reversing", "three_operands", "early_stop"}
    assert new | {"arithmetic", "spelling", "gsm8k", "humaneval"} <= set(rewarded) < set(all_tasks())
    assert not {"mmlu", "arc_easy", "documentation_choice", "smoltalk"} & set(rewarded)
    assert all(make(name, "train").has_reward for name in ("sorting", "spelling", "documentation"))
    assert EarlyStop(EarlyStopSettings(), "train").has_reward and not make("documentation_choice", "train").has_reward


def test_help_and_the_guide_name_the_tasks_with_a_reward() -> None:
    docs = {field.name: field.metadata["description"] for field in fields(MixtureTasks)}
    assert {name for name, doc in docs.items() if doc.endswith(" Has a reward.")} == set(tasks_with_reward())
    page = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")
    (named,) = (paragraph for paragraph in page.split("\n\n") if paragraph.startswith("Rewarded: "))
    assert set(re.findall(r"`(\w+)`", named)) == set(tasks_with_reward())


@pytest.mark.parametrize("name", ["sorting", "reversing", "three_operands", "early_stop"])
@pytest.mark.parametrize("more", [{}, {"partial_reward": True, "tool_bonus": 0.5}])
def test_no_answer_raises_or_is_worth_anything_by_being_odd(name: str, more: dict[str, Any]) -> None:
    kind = all_tasks()[name]
    keys = {key: value for key, value in more.items() if hasattr(kind.settings(), key)}
    arguments = (WORDS,) if name == "reversing" else ()
    task = kind.cls(kind.settings(**keys), "test", *arguments)  # type: ignore[call-arg,arg-type]
    for index in range(5):
        for content in ODD:
            assert 0 <= reward(task, index, content, ids=range(99)) <= 0.5, content
            if task.judged:
                assert not task.evaluate(task[index], content), content


def test_sorted_numbers_are_right_however_they_are_written() -> None:
    task = Sorting(SortingSettings(max_number=99), "test")
    for index in range(20):
        text = text_of(reference_of(task[index]))
        numbers = text.split()
        assert list(map(int, numbers)) == sorted(map(int, re.findall(r"\d+", question(task[index]))))
        right = (
            text,
            ", ".join(numbers),
            f"[{','.join(numbers)}]",
            f"Sorted: {text}.",
            "-".join(numbers),
            f" {text}\n",
        )
        assert all(task.evaluate(task[index], answer) for answer in right)
        wrong = (f"{text} {numbers[-1]}", " ".join(f"-{n}" for n in numbers), f"0{text}", f"{text}.5")
        assert not any(task.evaluate(task[index], answer) for answer in wrong)


def test_sets_of_numbers_of_the_test_part_are_never_sorted_in_training() -> None:
    train, test = ({text_of(reference_of(c)) for c in make("sorting", split)} for split in ("train", "test"))
    assert len(test) > 100 and not train & test
    for count, most in ((3, 9), (50, 9), (3, 10**6)):
        for split in ("train", "test"):
            assert len(list(Sorting(SortingSettings(size=50, test_size=50, count=count, max_number=most), split))) == 50


def test_a_reversed_word_is_right_in_any_letters_case() -> None:
    task = Reversing(ReversingSettings(), "test", WORDS)
    spaced = Reversing(ReversingSettings(spaced=True), "test", WORDS)
    for index in range(len(task)):
        text = text_of(reference_of(task[index]))
        assert text[::-1] in question(task[index])
        assert " ".join(text[::-1]) in question(spaced[index]) and text_of(reference_of(spaced[index])) == " ".join(
            text
        )
        for answer in (text.upper(), f'"{text}".', "-".join(text), f" {text}\n"):
            assert task.evaluate(task[index], answer) and spaced.evaluate(spaced[index], answer)


@pytest.mark.parametrize(
    ("given", "share"),
    [("1 3 5 7 9", 1.0), ("1 3 5 9 7", 0.6), ("1 3", 0.4), ("1 3 5 7 9 9 9 9 9 9", 0.5), ("3 1", 0.0), ("", 0.0)],
)
def test_partial_reward_is_the_share_of_places_that_are_right(given: str, share: float) -> None:
    problem = {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "1 3 5 7 9"}]}
    for partial in (True, False):
        task = Sorting(SortingSettings(partial_reward=partial), "train")
        assert task.reward(problem, Completion(given)) == (share if partial else float(share == 1))
    letters = str.maketrans("13579", "abcde", " ")
    answer = {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "abcde"}]}
    words = Reversing(ReversingSettings(partial_reward=True), "train", WORDS)
    assert words.reward(answer, Completion(given.translate(letters))) == share


def test_three_operands_are_computed_by_the_tool_or_not() -> None:
    task = ThreeOperands(ThreeOperandsSettings(size=1_000, tool_share=0.3), "train")
    references = [reference_of(conversation) for conversation in task]
    with_tool = [reference for reference in references if not isinstance(reference, str)]
    assert 0.25 < len(with_tool) / len(references) < 0.35
    for code, output, text in with_tool:
        assert evaluate(code["text"]) == output["text"] and text["text"].endswith(f" = {output['text']}")
        assert len(re.findall(r"\d+", code["text"])) == 3
    by_head = [reference.split(" = ") for reference in references if isinstance(reference, str)]
    assert all(evaluate(expression) == result for expression, result in by_head)
    assert 0.3 < sum("(" in code["text"] for code, _, _ in with_tool) / len(with_tool) < 0.5
    assert all(not isinstance(reference_of(c), str) for c in ThreeOperands(task.settings, "test"))


def test_triples_of_the_test_part_are_in_no_training_problem() -> None:
    def triples(split: str) -> set[tuple[int, ...]]:
        numbers = (re.findall(r"\d+", question(conversation)) for conversation in make("three_operands", split))
        return {tuple(sorted(map(int, found))) for found in numbers}

    assert len(triples("test")) > 400 and not triples("train") & triples("test")


def test_the_bonus_is_for_a_call_whose_result_is_said() -> None:
    def parts(output: str | None, text: str) -> Content:
        called = [{"type": "python", "text": "2*3+4"}]
        given = [] if output is None else [{"type": "python_output", "text": output}]
        return [*called, *given, {"type": "text", "text": text}]

    bare = ThreeOperands(ThreeOperandsSettings(), "test")
    task = ThreeOperands(ThreeOperandsSettings(tool_bonus=0.25), "test")
    result = text_of(reference_of(task[0])).rpartition(" = ")[2]
    worth = {
        1.25: [reference_of(task[0]), parts(result, f"It is {result}.")],
        1.0: [result, parts(None, result), parts("123456", result)],
        0.25: [parts("12", "It is 12."), parts("12.0", "12")],
        0.0: ["12", parts("12", "13"), parts("12", ""), [{"type": "text", "text": "12"}, *parts("12", "")]],
    }
    for expected, answers in worth.items():
        for answer in answers:
            assert reward(task, 0, answer) == expected, answer
            assert reward(bare, 0, answer) == float(expected >= 1), answer


def test_an_early_stop_is_rewarded_whatever_is_said() -> None:
    task = EarlyStop(EarlyStopSettings(within=3), "train")
    for content in ("", "keys", "anything else"):
        assert reward(task, 0, content, ids=[1, 2, 3]) == 1.0 == reward(task, 0, content, ids=[3])
        assert reward(task, 0, content, ids=[1, 2, 3, 4]) == 0.0 == reward(task, 0, content, ids=[1], finished=False)
    lengths = [len(reference_of(conversation).split()) for conversation in task]  # type: ignore[union-attr]
    assert min(lengths) == 1 and max(lengths) == 16 and 0.2 < sum(length <= 4 for length in lengths) / 2_000 < 0.3
    train, test = ({question(c) for c in EarlyStop(EarlyStopSettings(), split)} for split in ("train", "test"))
    assert train and test and not train & test
    again = EarlyStop(EarlyStopSettings(), "train")
    assert (
        list(again) == list(task)
        and again.fingerprint == task.fingerprint != EarlyStop(again.settings, "test").fingerprint
    )


def test_a_task_with_a_reward_alone_is_trained_on_and_not_measured(tmp_path: Path) -> None:
    settings = build(MixtureSettings, {"tasks": {"early_stop": {}, "sorting": {}}})
    judged = only_judged(settings)
    assert judged is not None and list(judged.tasks.chosen()) == ["sorting"]
    tasks = build_tasks(settings.tasks, "train", TaskContext(tmp_path))
    assert list(tasks) == ["early_stop", "sorting"]
    with pytest.raises(UserError, match="early_stop: no answer is right or wrong"):
        tasks["early_stop"].evaluate(tasks["early_stop"][0], "keys")


def test_reinforcement_learning_can_have_words_that_fine_tuning_never_saw() -> None:
    """The guide's settings: size for the one, start for the other."""
    settings = SpellingSettings(size=300)
    taught = Spelling(settings, "train", WORDS)
    unseen = Spelling(replace(settings, start=300, size=None), "train", WORDS)
    words = [{text_of(reference_of(conversation)) for conversation in task} for task in (taught, unseen)]
    assert len(words[0]) == 300 and len(words[1]) == len(taught.words) - 300 and not words[0] & words[1]
    held_out = {text_of(reference_of(conversation)) for conversation in make("spelling", "test")}
    assert not held_out & (words[0] | words[1])


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_a_reward_is_one_number_of_any_library(kind: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    task = make("sorting", "train")
    prompt, rewards = Prompt("sorting", task[0], []), Rewards("tests.helpers.rewards.constant")
    for value, expected in ((kind(0.5), 0.5), (kind([2]), 2.0), (kind([[True]]), 1.0)):
        monkeypatch.setattr(rewards, "_own", lambda *of, value=value: value)
        assert rewards.reward(task, prompt, Completion("")) == expected
    odd = (kind([1.0, 2.0]), kind([]), kind(float("nan")), kind(1j), 10**400, "1", None)
    for value in odd:
        monkeypatch.setattr(rewards, "_own", lambda *of, value=value: value)
        with pytest.raises(UserError, match=r"rl\.reward=tests\.helpers\.rewards\.constant gives .* a finite number"):
            rewards.reward(task, prompt, Completion(""))
    monkeypatch.setattr(rewards, "_own", lambda *of: odd[0])
    with pytest.raises(UserError, match=r"of shape \(2,\)"):
        rewards.reward(task, prompt, Completion(""))


def test_a_task_without_a_reward_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(UserError, match=r"mixture\.tasks\.documentation_choice: its answers are chosen") as refused:
        Rewards(None).require({name: make(name, "train") for name in ("sorting", "documentation_choice")})
    assert len(refused.value.problems) == 1
    assert all(name in refused.value.fix for name in tasks_with_reward()) and "mmlu" not in refused.value.fix
