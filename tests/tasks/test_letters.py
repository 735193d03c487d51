"""SpellingBee, SimpleSpelling, their lists of words, and multiple choice from documentation."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import build
from nanochat_pl.tasks.base import Completion, Split, reference_of, text_of
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.multiple_choice import choice_conversation, render_choices
from nanochat_pl.tasks.synthetic.documentation import Documentation, DocumentationSettings
from nanochat_pl.tasks.synthetic.documentation_choice import DocumentationChoice, DocumentationChoiceSettings
from nanochat_pl.tasks.synthetic.simple_spelling import SimpleSpelling, SimpleSpellingSettings
from nanochat_pl.tasks.synthetic.spelling_bee import _QUESTIONS as QUESTIONS
from nanochat_pl.tasks.synthetic.spelling_bee import SpellingBee, SpellingBeeSettings
from nanochat_pl.tasks.synthetic.words import words_of
from tests.tasks.test_tasks import MORE_FUNCTIONS, WORDS, make, question

SPLITS: tuple[Split, Split] = ("train", "test")


def test_spelling_bee_spells_counts_and_checks() -> None:
    for conversation in make("spelling_bee", "test"):
        first, call, output, last = reference_of(conversation)
        word, letter = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", call["text"]).groups()  # type: ignore[union-attr]
        count = str(word.count(letter))
        assert output["text"] == count and last["text"] == f"\n\n#### {count}"
        assert f"{word}:{','.join(word)}\n" in first["text"]
        lines = re.findall(r"^(\d+):(\w)(?: (\d+))?$", first["text"], re.M)
        assert [sign for _, sign, _ in lines] == list(word)
        counted = [running for _, sign, running in lines if sign == letter]
        assert counted == [str(n + 1) for n in range(int(count))], "the count runs on at each of them, and only there"
        assert not any(running for _, sign, running in lines if sign != letter)
        assert word in question(conversation) and letter in question(conversation)


def test_spelling_bee_is_asked_in_many_ways() -> None:
    task = make("spelling_bee", "train")
    asked = Counter(re.sub(r"['\"`]", "", question(c)) for c in task)
    assert len(asked) > 0.95 * len(task)
    text = "\n".join(question(c) for c in task)
    for sign in ("?", "？", "¿", "'", '"', "`", "Wie viele", "Combien", "сколько", "中有几个", "how many"):
        assert sign in text, sign
    letters = [re.search(r"count\('(\w)'\)", reference_of(c)[1]["text"])[1] for c in task]  # type: ignore[index]
    absent = sum(reference_of(c)[2]["text"] == "0" for c in task) / len(letters)
    assert 0.02 < absent < 0.12, "one letter in ten is any of the alphabet"


def test_wordings_of_spelling_bee_have_their_blanks() -> None:
    """In languages that have them; an s may follow a letter, as in "the rs"."""
    for wording in QUESTIONS:
        assert wording.count("{letter}") == wording.count("{word}") == 1, wording
        assert not re.search(r"[^\W\d_]\{|\}(?!s\b)[a-zа-яα-ω]|  |^ | $", wording), wording
    assert len(set(QUESTIONS)) == len(QUESTIONS) >= 50


def test_spelling_bee_is_judged_by_what_stands_behind_the_mark() -> None:
    task = make("spelling_bee", "test")
    conversation = next(c for c in task if reference_of(c)[2]["text"] == "2")
    for right in ("#### 2", "I count 3.\n\n#### 2", "#### 2.0", "#### 5 no: #### 2"):
        assert task.evaluate(conversation, right) and task.reward(conversation, Completion(right)) == 1.0, right
    for wrong in ("2", "#### 3", "####", "#### two", "2 ####", "#### 2 #### 3"):
        assert not task.evaluate(conversation, wrong) and task.reward(conversation, Completion(wrong)) == 0.0, wrong


def test_simple_spelling_asks_in_one_wording_and_goes_round_the_words() -> None:
    task = SimpleSpelling(SimpleSpellingSettings(size=2_000), "train", WORDS)
    asked = Counter(map(question, task))
    assert all(re.fullmatch(r"Spell the word: \w+", text) for text in asked)
    assert set(asked.values()) <= {2_000 // len(task.words), 2_000 // len(task.words) + 1}
    everything = SimpleSpelling(SimpleSpellingSettings(size=None), "train", WORDS)
    assert len(everything) == len(everything.words)


def test_words_are_held_out_alike_by_all_tasks() -> None:
    test = set(make("spelling", "test").words)
    assert all(set(make(name, "test").words) == test for name in ("spelling_bee", "simple_spelling"))
    asked = set(re.findall(r"\w+", " ".join(text_of(reference_of(c)) for c in make("spelling_bee", "train"))))
    assert test and not test & asked


def test_start_passes_over_training_conversations_alone() -> None:
    for name in ("arithmetic", "spelling_bee", "identity", "documentation_choice"):
        whole = make(name, "train")
        settings = replace(whole.settings, start=7, size=20) if hasattr(whole, "settings") else None
        if name == "documentation_choice":
            settings = DocumentationChoiceSettings(start=7, size=20)
        arguments = {"spelling_bee": (WORDS,), "documentation_choice": (MORE_FUNCTIONS,)}.get(name, ())
        later = type(whole)(settings, "train", *arguments)  # type: ignore[call-arg, arg-type]
        assert list(later) == [whole[index] for index in range(7, 27)], name
        test = type(whole)(settings, "test", *arguments)  # type: ignore[call-arg, arg-type]
        assert test[0] == make(name, "test")[0]
        keys = {"start": 3, "step": 5, "size": 20, "test_start": 1, "test_step": 4, "test_size": 5}
        stepped = [type(whole)(replace(settings, **keys), split, *arguments) for split in ("train", "test")]  # type: ignore
        held_out = make(name, "test")
        assert list(stepped[0]) == [whole[index] for index in range(3, 103, 5)], name
        assert list(stepped[1]) == [held_out[index] for index in range(1, 21, 4)], name
        once = type(whole)(replace(settings, **{**keys, "step": 1}), "train", *arguments)  # type: ignore
        assert once.fingerprint != stepped[0].fingerprint
    with pytest.raises(UserError, match=r"mixture\.tasks\.spelling_bee\.start=9999: passes over all"):
        SpellingBee(SpellingBeeSettings(start=9999), "train", WORDS)


def test_words_come_from_a_list_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("Apple\nbanana\nit's\nnew york\nÉcole\nab\n\nbanana\r\n", encoding="utf-8")
    with gzip.open(tmp_path / "more.txt.gz", "wb") as file:
        file.write(b"cherry\n")
    context = TaskContext(tmp_path / "cache")

    def words(**keys: object) -> tuple[str, ...]:
        return words_of("mixture.tasks.spelling_bee", build(SpellingBeeSettings, keys), context)

    assert words(words_path=str(tmp_path / "words.txt")) == ("apple", "banana", "école")
    assert words(words_path=str(tmp_path), min_letters=6) == ("banana", "cherry")
    with pytest.raises(UserError, match=r"mixture\.tasks\.spelling_bee\.words_path='nowhere': there is no such file"):
        words(words_path="nowhere")
    with pytest.raises(UserError, match=r"words\.txt: has no words of 20 to 30 letters"):
        words(words_path=str(tmp_path / "words.txt"), min_letters=20, max_letters=30)
    (tmp_path / "latin.txt").write_bytes("école\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: line 1 is not UTF-8"):
        words(words_path=str(tmp_path / "latin.txt"))
    with pytest.raises(UserError, match="both given"):
        words(words_path="a", words_repo="o/n")
    with pytest.raises(UserError, match="is about python_docs"):
        words(words_path="a", min_documents=2)


def test_words_come_from_a_mirror_of_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "hub/datasets/someone/english-words"
    folder.mkdir(parents=True)
    (folder / "alpha.txt").write_text("pear\nplum\n", encoding="utf-8")
    (folder / "names.txt").write_text("alice\n", encoding="utf-8")
    settings = build(SpellingBeeSettings, {"words_repo": "someone/english-words", "words_files": "alpha.txt"})
    context = TaskContext(tmp_path / "cache", hub=tmp_path / "hub")
    assert words_of("mixture.tasks.spelling_bee", settings, context) == ("pear", "plum")
    with pytest.raises(UserError, match=r"words_files='beta\.txt': .* has no such file; valid: alpha\.txt, names"):
        words_of("mixture.tasks.spelling_bee", replace(settings, words_files="beta.txt"), context)
    with pytest.raises(UserError, match=r"nothing of someone/english-words \(main\) is here") as error:
        words_of("mixture.tasks.spelling_bee", settings, TaskContext(tmp_path / "cache"))
    assert error.value.fix.startswith("Fetch it: nanochat-pl download data=hub data.repo=someone/english-words")


def test_too_few_words_are_refused() -> None:
    with pytest.raises(UserError, match=r"mixture\.tasks\.simple_spelling: there are no words for its test part"):
        SimpleSpelling(SimpleSpellingSettings(), "test", ["apple"])


def test_messages_name_the_group_that_the_task_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "words.txt").write_text("apple\n", encoding="utf-8")
    context = TaskContext(tmp_path / "cache", where="chatcore")
    for keys, said in (
        ({}, "there are no words for its test part"),
        ({"start": 9}, "start=9: passes over all 1 train"),
    ):
        settings = build(SpellingBeeSettings, {"words_path": str(tmp_path / "words.txt"), **keys})
        with pytest.raises(UserError, match=rf"^chatcore\.spelling_bee[.:] ?{said}"):
            SpellingBee.from_settings(settings, "train" if keys else "test", context)
    monkeypatch.setitem(vars(context), "corpus", SimpleNamespace(stdlib_docstrings=[]))
    with pytest.raises(UserError, match=r"^chatcore\.documentation_choice: there are not 4 functions") as error:
        DocumentationChoice.from_settings(DocumentationChoiceSettings(max_chars=20), "test", context)
    assert "chatcore.documentation_choice.max_chars" in error.value.fix
    with pytest.raises(UserError, match=r"^chatcore\.documentation\.start=99999: passes over"):
        Documentation.from_settings(DocumentationSettings(start=99_999), "train", context)


def test_choices_stand_before_their_letters_without_a_blank() -> None:
    """The letter in the question has to be the token that the answer is (a regression: blanks in a rendered task)."""
    text = render_choices("Which?", "AB", ["x", "y"])
    assert text == (
        "Multiple Choice question: Which?\n- x=A\n- y=B\n\nRespond only with the letter of the correct answer."
    )
    conversation = choice_conversation("Which?", "AB", ["x", "y"], "B")
    assert (
        question(conversation) == text and reference_of(conversation) == "B" and conversation["letters"] == ["A", "B"]
    )
    with pytest.raises(ValueError, match="zip"):
        render_choices("Which?", "ABC", ["x", "y"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_documentation_choice_has_one_right_choice_among_four(split: str) -> None:
    task, summaries = make("documentation_choice", split), dict(MORE_FUNCTIONS)
    assert (task.kind, task.baseline) == ("categorical", 0.25)
    places: Counter[str] = Counter()
    kinds: Counter[bool] = Counter()
    for conversation in task:
        first, *lines = question(conversation).splitlines()
        choices = dict(reversed(line.removeprefix("- ").rsplit("=", 1)) for line in lines if line.startswith("- "))
        assert list(choices) == list(task.letters(conversation)) == ["A", "B", "C", "D"]
        asked = re.search(r"module\.function_\d+", first)
        kinds[asked is not None] += 1
        if asked:
            right = [letter for letter, choice in choices.items() if choice == summaries[asked[0]]]
        else:
            right = [letter for letter, choice in choices.items() if summaries[choice] in first]
        assert right == [reference_of(conversation)], "no other choice is right as well"
        places[right[0]] += 1
    assert len(places) == 4 and min(places.values()) > 0.15 * len(task), "the right letter is any of the four"
    assert 0.4 < kinds[True] / len(task) < 0.6


def test_functions_of_the_test_part_of_documentation_choice_are_not_in_training() -> None:
    def named(split: str) -> tuple[set[str], set[str]]:
        text = "\n".join(map(question, make("documentation_choice", split)))
        return set(re.findall(r"function_\d+", text)), set(re.findall(r"the number \d+ of", text))

    train, test = named("train"), named("test")
    assert len(test[0]) > 30 and not train[0] & test[0] and not train[1] & test[1]
    documentation = [Documentation(DocumentationSettings(functions=9_999), split, MORE_FUNCTIONS) for split in SPLITS]
    for task in documentation:  # it taught a third of them
        text = "\n".join(f"{question(c)} {reference_of(c)}" for c in task)
        assert text and not test[0] & set(re.findall(r"function_\d+", text))
        assert not test[1] & set(re.findall(r"the number \d+ of", text))
    with pytest.raises(UserError, match="there are not 4 functions for its test part"):
        DocumentationChoice(DocumentationChoiceSettings(), "test", MORE_FUNCTIONS[:10])
