"""What every task promises: good conversations, nothing shared between its parts, a judge that can tell."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build
from nanochat_pl.data.sources.docstrings import Docstring
from nanochat_pl.tasks import base
from nanochat_pl.tasks.base import Task, conversation_of, is_held_out, last_number, reference_of, text_of
from nanochat_pl.tasks.settings import MixtureTasks
from nanochat_pl.tasks.synthetic.arithmetic import Arithmetic, ArithmeticSettings, WordProblems, WordProblemSettings
from nanochat_pl.tasks.synthetic.documentation import (
    Documentation,
    DocumentationSettings,
    documented_functions,
    in_teaching_order,
)
from nanochat_pl.tasks.synthetic.documentation_choice import DocumentationChoice, DocumentationChoiceSettings
from nanochat_pl.tasks.synthetic.identity import Identity, IdentitySettings
from nanochat_pl.tasks.synthetic.out_of_scope import OutOfScope, OutOfScopeSettings
from nanochat_pl.tasks.synthetic.out_of_scope_questions import SLOTS, TEST_KINDS, TRAIN_KINDS
from nanochat_pl.tasks.synthetic.reversing import Reversing, ReversingSettings
from nanochat_pl.tasks.synthetic.simple_spelling import SimpleSpelling, SimpleSpellingSettings
from nanochat_pl.tasks.synthetic.sorting import Sorting, SortingSettings
from nanochat_pl.tasks.synthetic.spelling import LetterCounting, LetterCountingSettings, Spelling, SpellingSettings
from nanochat_pl.tasks.synthetic.spelling_bee import SpellingBee, SpellingBeeSettings
from nanochat_pl.tasks.synthetic.three_operands import ThreeOperands, ThreeOperandsSettings
from nanochat_pl.tokenizer import TokenizerSettings, train_tokenizer
from nanochat_pl.tokenizer.chat_format import problems_of_conversation
from nanochat_pl.tools.calculator import evaluate

_LETTERS = random.Random(7)
WORDS = sorted({"".join(_LETTERS.choices("abcdehilmnorstu", k=_LETTERS.randint(3, 9))) for _ in range(600)})
FUNCTIONS = [(f"module.function_{n}", f"Return the number {n} of all numbers.") for n in range(50)]
MORE_FUNCTIONS = [(f"module.function_{n}", f"Return the number {n // 2} of all numbers.") for n in range(600)]


def make(name: str, split: str) -> Task:
    match name:
        case "arithmetic":
            return Arithmetic(ArithmeticSettings(size=2_000, test_size=500), split)
        case "word_problems":
            return WordProblems(WordProblemSettings(size=2_000, test_size=500), split)
        case "spelling":
            return Spelling(SpellingSettings(size=2_000), split, WORDS)
        case "letter_counting":
            return LetterCounting(LetterCountingSettings(size=2_000), split, WORDS)
        case "long_letter_counting":
            return LetterCounting(LetterCountingSettings(size=500, long_form=True), split, WORDS)
        case "spelling_bee":
            return SpellingBee(SpellingBeeSettings(size=2_000), split, WORDS)
        case "simple_spelling":
            return SimpleSpelling(SimpleSpellingSettings(size=2_000), split, WORDS)
        case "documentation_choice":
            return DocumentationChoice(DocumentationChoiceSettings(size=2_000), split, MORE_FUNCTIONS)
        case "identity":
            return Identity(IdentitySettings(), split)
        case "documentation":
            return Documentation(DocumentationSettings(), split, FUNCTIONS)
        case "out_of_scope":
            settings = OutOfScopeSettings(size=2_000, function_share=0.25)
            return OutOfScope(settings, split, [name for name, _ in MORE_FUNCTIONS])
        case "sorting":
            return Sorting(SortingSettings(size=2_000), split)
        case "reversing":
            return Reversing(ReversingSettings(), split, WORDS)
        case "three_operands":
            return ThreeOperands(ThreeOperandsSettings(size=2_000, tool_share=0.5, test_size=500), split)
    raise ValueError(name)


TASKS = (
    *("arithmetic", "word_problems", "spelling", "letter_counting", "long_letter_counting"),
    *("identity", "documentation", "spelling_bee", "simple_spelling", "documentation_choice"),
    *("out_of_scope", "sorting", "reversing", "three_operands"),
)


def question(conversation) -> str:
    return conversation["messages"][0]["content"]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", TASKS)
def test_conversations_are_valid_and_their_references_right(name, split):
    task = make(name, split)
    assert len(task) > 0
    for conversation in task:
        assert problems_of_conversation(conversation) == []
        assert [message["role"] for message in conversation["messages"]] == ["user", "assistant"]
        assert "{" not in question(conversation) and "}" not in question(conversation)
        reference = reference_of(conversation)
        assert task.evaluate(conversation, reference)
        assert task.evaluate(conversation, text_of(reference)), "an answer without the tool is judged by its words"


NUMBERS_LAST = (
    *("arithmetic", "word_problems", "letter_counting", "long_letter_counting", "spelling_bee", "three_operands"),
)


@pytest.mark.parametrize("name", TASKS)
def test_wrong_answers_are_wrong(name):
    task = make(name, "test")
    for conversation in task:
        text = text_of(reference_of(conversation))
        wrong = ["", "I do not know."]
        if name == "out_of_scope":
            wrong = ["", "Paris.", "12 + 7 = 19", "Return a list. I do not know."]
        elif name == "documentation_choice":
            wrong += [letter for letter in "ABCDE" if letter != text] + [f"{text}{text}"]
        elif name == "sorting":
            wrong += [text + " 3", text[:-1], " ".join(reversed(text.split())) + " 0", text.replace(" ", "")]
        elif name == "reversing":
            wrong += [text + "x", text[:-1], f"It is {text}."]
        elif name in NUMBERS_LAST:
            wrong += [text + " or 7777777", "It is a number."]
        elif name != "identity":
            wrong += [text + "x", text[:-1], text.upper()]
        for answer in wrong:
            assert not task.evaluate(conversation, answer), (text, answer)
            assert not task.evaluate(conversation, [{"type": "text", "text": answer}])
        # What the tool gave is no answer yet.
        assert not task.evaluate(conversation, [{"type": "python_output", "text": text}])


@pytest.mark.parametrize("name", TASKS)
def test_no_question_is_in_both_parts(name):
    train = {question(conversation).lower() for conversation in make(name, "train")}
    test = {question(conversation).lower() for conversation in make(name, "test")}
    assert not train & test


def test_kinds_of_questions_out_of_scope_are_held_out_whole():
    assert not set(TRAIN_KINDS) & set(TEST_KINDS)
    train, test = (
        {wording for wordings in kinds.values() for wording in wordings} for kinds in (TRAIN_KINDS, TEST_KINDS)
    )
    assert not train & test
    task = {split: make("out_of_scope", split) for split in ("train", "test")}
    assert not set(task["train"].functions) & set(task["test"].functions)
    asked = [sum("module.function_" in question(conversation) for conversation in task[split]) for split in task]
    assert 0.2 < asked[0] / len(task["train"]) < 0.3 and 0.1 < asked[1] / len(task["test"]) < 0.4
    none = OutOfScope(OutOfScopeSettings(), "train", [name for name, _ in MORE_FUNCTIONS])
    assert all("I do not know. Ask me" in text_of(reference_of(conversation)) for conversation in none)
    assert all(len(set(values)) == len(values) for values in SLOTS.values())


def test_operand_pairs_of_the_test_part_are_in_no_training_problem():
    def pairs(split):
        for name in ("arithmetic", "word_problems"):
            for conversation in make(name, split):
                code = reference_of(conversation)[0]["text"]
                operands = code.replace("*", "+").replace("/", "+").replace("-", "+").split("+")
                yield tuple(sorted(map(int, operands)))

    train, test = set(pairs("train")), set(pairs("test"))
    assert len(test) > 300 and not train & test


def test_words_of_the_test_part_are_in_no_training_conversation():
    test = set(make("spelling", "test").words)
    assert test == set(make("letter_counting", "test").words), "both tasks hold out the same words"
    assert 0.05 * len(WORDS) < len(test) < 0.15 * len(WORDS)
    for name in ("spelling", "letter_counting"):
        for conversation in make(name, "train"):
            assert not test & set(question(conversation).replace("'", " ").replace('"', " ").strip("?. ").split())


@pytest.mark.parametrize("name", TASKS)
def test_an_item_depends_on_its_number_alone(name):
    first, second = make(name, "train"), make(name, "train")
    backwards = [second[index] for index in reversed(range(len(second)))]
    assert list(first) == backwards[::-1]
    assert first.fingerprint == second.fingerprint != make(name, "test").fingerprint
    for index in (-1, len(first)):
        with pytest.raises(IndexError):
            first[index]


LONG_LIST = ["".join(_LETTERS.choices("abcdehilmnorstu", k=10)) for _ in range(6_000)]


@pytest.fixture
def few_are_looked_at(monkeypatch):
    """A large task is one with more than 2,000 conversations, so that these tests take a tenth of the time."""
    monkeypatch.setattr(base, "_MAX_HASHED", 2_000)


@pytest.mark.usefixtures("few_are_looked_at")
def test_a_corrected_word_of_a_long_list_is_another_task():
    """Of large tasks every second conversation was looked at: half of the words could change unseen."""
    settings = SimpleSpellingSettings(size=None)
    task = SimpleSpelling(settings, "train", LONG_LIST)
    assert len(task) > 5_000
    again = SimpleSpelling(replace(settings, words_path="a", test_size=7, repeat=3), "train", LONG_LIST[::-1])
    assert again.fingerprint == task.fingerprint, "it is of what it comes from, wherever that lies"
    for place in (1, 5, 1001):
        word = task.words[place]
        near = next(other for last in "xyzw" if not is_held_out("word", other := word[:-1] + last))
        other = SimpleSpelling(settings, "train", [near if each == word else each for each in LONG_LIST])
        assert other.words[place] == near and other.words[place + 1 :] == task.words[place + 1 :]
        assert other.fingerprint != task.fingerprint, place
    changed = [
        replace(settings, start=1, size=len(task) - 1),
        replace(settings, size=len(task) - 1),
        replace(settings, size=len(task) // 2, step=2),
    ]
    assert len({task.fingerprint, *(SimpleSpelling(each, "train", LONG_LIST).fingerprint for each in changed)}) == 4


class Numbers(Task):
    """Numbers, of which one may be another."""

    def __init__(self, size, other=-1):
        super().__init__("numbers", "train", size)
        self.other = other

    def conversation(self, index):
        return conversation_of(str(index), "other" if index == self.other else "same")

    def evaluate(self, conversation, answer):
        return True


@pytest.mark.usefixtures("few_are_looked_at")
def test_a_fingerprint_is_of_everything_that_a_large_task_comes_from():
    numbers = [Numbers(4_001), *(Numbers(4_001, other) for other in (0, 1, 2, 3, 3_999, 4_000)), Numbers(4_002)]
    assert len({task.fingerprint for task in numbers}) == len(numbers), "one that says nothing is looked at whole"
    settings = [ArithmeticSettings(size=4_000), ArithmeticSettings(size=4_000, max_operand=1_000)]
    tasks = [Arithmetic(each, "train") for each in (*settings, replace(settings[0], start=4))]
    assert len({task.fingerprint for task in tasks}) == 3
    choices = DocumentationChoiceSettings(size=4_000)
    functions = [MORE_FUNCTIONS, [*MORE_FUNCTIONS[:-1], ("module.renamed", MORE_FUNCTIONS[-1][1])]]
    assert len({DocumentationChoice(choices, "train", each).fingerprint for each in functions}) == 2


@pytest.mark.usefixtures("few_are_looked_at")
@pytest.mark.parametrize("operation", "+-*/")
def test_a_fingerprint_of_a_large_task_looks_at_all_kinds_of_its_conversations(operation, monkeypatch):
    """Every second or fourth conversation would be one operation's alone."""
    task, changed = (Arithmetic(ArithmeticSettings(size=8_000), "train") for _ in range(2))
    conversation = changed.conversation

    def other_words(index):
        made = conversation(index)
        is_its = operation in reference_of(made)[0]["text"]
        return conversation_of("other", "words") if is_its else made

    monkeypatch.setattr(changed, "conversation", other_words)
    assert changed.fingerprint != task.fingerprint


def fingerprints():
    return [make(name, split).fingerprint for name in TASKS for split in ("train", "test")]


@pytest.mark.slow
def test_items_do_not_depend_on_the_hash_seed():
    """Nor what they are here, where the seed is another one."""
    program = "from tests.tasks import test_tasks\nprint(*test_tasks.fingerprints())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == fingerprints()


def test_arithmetic_is_what_its_settings_say():
    settings = ArithmeticSettings(size=2_000, max_operand=500, small_operand=50, small_share=0.5)
    problems = [reference_of(conversation) for conversation in Arithmetic(settings, "train")]
    for code, output, text in problems:
        assert evaluate(code["text"]) == output["text"] and text["text"].endswith(f" = {output['text']}")
    operands = [list(map(int, code["text"].split("+"))) for code, _, _ in problems if "+" in code["text"]]
    assert len(operands) == 500, "the four operations take turns"
    assert max(map(max, operands)) <= 500
    assert 0.45 < sum(max(pair) <= 50 for pair in operands) / len(operands) < 0.6
    quotients = [output["text"] for code, output, _ in problems if "/" in code["text"]]
    assert sum(quotient.endswith(".0") for quotient in quotients) > 0.5 * len(quotients)
    assert any(len(quotient) > 10 for quotient in quotients), "10 / 3 is asked too"
    assert any(output["text"].startswith("-") for _, output, _ in problems)


def test_smallest_arithmetic_has_problems_in_both_parts():
    settings = {"size": 100, "max_operand": 20, "small_operand": 20, "test_size": 100}
    for split in ("train", "test"):
        assert len(list(Arithmetic(ArithmeticSettings(**settings), split))) == 100
        assert len(list(WordProblems(WordProblemSettings(**settings), split))) == 100


def test_word_problems_have_whole_answers():
    for split in ("train", "test"):
        for conversation in make("word_problems", split):
            value = last_number(text_of(reference_of(conversation)))
            assert value >= 0 and value == int(value)


def test_letters_are_counted_by_the_tool():
    for name in ("letter_counting", "long_letter_counting"):
        for conversation in make(name, "test"):
            parts = reference_of(conversation)
            code = next(part["text"] for part in parts if part["type"] == "python")
            output = next(part["text"] for part in parts if part["type"] == "python_output")
            word, letter = code.replace("count", "").replace("(", "").replace(")", "").split("'")[1::2]
            assert output == evaluate(code) == str(word.strip().count(letter))


def test_identity_is_the_configured_name_in_any_case():
    task = Identity(IdentitySettings(name="Ada-7", creator="two friends"), "test")
    assert task.evaluate(task[0], "i am ADA-7!") and not task.evaluate(task[0], "I am Ada 7.")
    answers = {text_of(reference_of(conversation)) for conversation in task}
    assert any("two friends" in answer for answer in answers)
    assert len({question(c) for c in make("identity", "train")}) >= 150
    assert len({question(c) for c in make("identity", "test")}) >= 50


def test_documentation_asks_about_known_functions_in_new_wordings():
    train, test = make("documentation", "train"), make("documentation", "test")
    known = {text_of(reference_of(conversation)) for conversation in train}
    assert {text_of(reference_of(conversation)) for conversation in test} == known
    assert len({question(conversation) for conversation in train}) == len(train) == 6 * len(known)
    assert 40 <= len(known) < len(FUNCTIONS), "without those that documentation_choice holds out"


def test_documented_functions_are_public_functions_with_a_summary_line():
    def doc(name, text, kind="function"):
        return Docstring(name.split(".")[0], name, kind, "", text)

    found = dict(
        documented_functions(
            [
                doc("statistics.median", "Return the median of data.\n\nMore."),
                doc("statistics._private", "Return what nobody asks for."),
                doc("statistics.Normal", "A normal distribution of things.", "class"),
                doc("ntpath.join", "Join two or more path components."),
                doc("os.two_lines", "Return a thing that is\ndescribed in two lines."),
                doc("os.signature", "signature(a, b) -> integer"),
                doc("os.long", "Return " + "very " * 40 + "much."),
                doc("os.accent", "Return the café of the process."),
            ],
            max_chars=80,
        )
    )
    assert found["statistics.median"] == "Return the median of data."
    assert {name for name in found if name.startswith(("statistics.", "ntpath.", "os."))} == {"statistics.median"}
    assert "math.sqrt" in found and "len" in found and "str.upper" in found, "functions in C are found by inspect"
    assert all(15 <= len(summary) <= 80 and summary.isascii() for summary in found.values())


def test_held_out_is_one_in_ten():
    assert 850 < sum(is_held_out("thing", n) for n in range(10_000)) < 1_150


def test_words_are_counted_in_the_tokens_in_which_they_were_asked():
    """A blank before a word changes how it is cut; a small model that had to cut it anew could not just copy."""
    task = make("letter_counting", "test")
    texts = [question(conversation) for conversation in make("spelling", "train")]
    tokenizer = train_tokenizer(texts, TokenizerSettings(vocab_size=500))
    for conversation in task:
        code = reference_of(conversation)[0]["text"]
        word = code.split("'")[1]
        wanted = tokenizer.encode(word)
        for text in (question(conversation), code):
            ids = tokenizer.encode(text)
            assert any(ids[start : start + len(wanted)] == wanted for start in range(len(ids))), (text, word)


def test_functions_that_are_taught_are_not_called_unknown(tmp_path: Path) -> None:
    """A mixture that asks for both is refused; with the same numbers they share no function."""
    with pytest.raises(UserError) as error:
        build(
            MixtureTasks,
            {"documentation": {"functions": 500}, "out_of_scope": {"function_share": 0.1}},
            "mixture.tasks",
        )
    assert "mixture.tasks.out_of_scope.known_functions=400: but documentation.functions=500" in str(error.value)
    with pytest.raises(UserError, match=r"out_of_scope\.max_chars=60: but documentation\.max_chars=80"):
        build(MixtureTasks, {"documentation": {}, "out_of_scope": {"max_chars": 60, "function_share": 0.1}})
    build(MixtureTasks, {"documentation": {"functions": 500}, "out_of_scope": {}})
    taught = Documentation(DocumentationSettings(functions=60), "train", MORE_FUNCTIONS).functions
    unknown = in_teaching_order(MORE_FUNCTIONS)[60:]
    assert len(taught) == 60 and len(unknown) > 300 and not set(taught) & set(unknown)


def test_documented_functions_do_not_depend_on_hooks_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch replaces sys.excepthook where several processes train: their conversations were not those of one."""
    before = documented_functions([], 200)
    assert "sys.excepthook" in dict(before)
    monkeypatch.setattr(sys, "excepthook", lambda *error: None)
    monkeypatch.setattr(sys, "displayhook", lambda value: None)
    assert documented_functions([], 200) == before
