"""Spelling words, and counting a letter in them through the tool.

The words of the test part occur in neither task's training part.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from random import Random

from nanochat_pl.common.schema import setting
from nanochat_pl.tasks.base import (
    Content,
    Conversation,
    Part,
    conversation_of,
    generator,
    same_last_number,
    text_of,
    tool_answer,
)
from nanochat_pl.tasks.registry import task
from nanochat_pl.tasks.synthetic.words import WordSettings, WordTask
from nanochat_pl.tools.calculator import evaluate

_SPELL = (
    "Spell the word: {word}",
    "Spell the word {word}.",
    "How do you spell {word}?",
    "Spell {word}",
    "spell {word}",
    "What are the letters of {word}?",
    "Can you spell the word {word}?",
    "Please spell {word}.",
)
_COUNT = (
    "How many {letter} are in {word}?",
    "how many {letter} are in {word}",
    "How many {letter}'s are in {word}?",
    "How many {letter}'s are there in the word {word}?",
    "How many times does {letter} occur in {word}?",
    "How often does the letter {letter} occur in {word}?",
    "Count the {letter} in {word}.",
    "Count the letter {letter} in the word {word}",
    "What is the number of {letter} in {word}?",
    "In the word {word}, how many {letter} are there?",
)
_QUOTES = ("", "", "'", '"')
_LETTER_OF_WORD_SHARE = 0.9


@dataclass(frozen=True)
class SpellingSettings(WordSettings):
    """``Spell the word: apple``, half of it in other wordings; words of the corpus."""


@task("spelling", SpellingSettings)
class Spelling(WordTask):
    """``Spell the word: apple`` → ``apple:a,p,p,l,e``. An answer is right if it is just this.

    Attributes:
        plain_share: of the training questions, those in the plain wording, which is what the test part asks.
    """

    key = "spelling"
    plain_share = 0.5

    def conversation(self, index: int) -> Conversation:
        word = self.word(index)
        random = generator(self.name, self.split, index)
        plain = self.split == "test" or random.random() < self.plain_share
        question = (_SPELL[0] if plain else random.choice(_SPELL)).format(word=word)
        return conversation_of(question, spelled(word))

    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        return text_of(answer).strip() == conversation["messages"][-1]["content"]


@dataclass(frozen=True)
class LetterCountingSettings(WordSettings):
    """``How many r are in strawberry?``, answered with the tool; words of the corpus."""

    size: int | None = setting(6_000, "Training conversations; null: one for each word.", at_least=1)
    long_form: bool = setting(False, "Spell the word and walk through its letters before the tool is called.")


@task("letter_counting", LetterCountingSettings)
class LetterCounting(WordTask):
    """``How many r are in strawberry?``, by ``'strawberry'.count('r')``. Right if the answer ends on the number."""

    key = "letter_counting"

    def conversation(self, index: int) -> Conversation:
        word = self.word(index)
        random = generator(self.name, self.split, index)
        letter = letter_to_count(random, word)
        quote = random.choice(_QUOTES)
        question = random.choice(_COUNT).format(letter=f"{quote}{letter}{quote}", word=f"{quote}{word}{quote}")
        return conversation_of(question, self._answer(word, letter, quote))

    def _answer(self, word: str, letter: str, quote: str) -> list[Part]:
        if self.settings.long_form:
            code, output = count_by_tool(word, letter)
            by_hand = f"{spelled(word)}\n{walked(word, letter)}\nLet me check: "
            return [{"type": "text", "text": by_hand}, *tool_answer(code, output, f"\n#### {output}")]
        # A blank stands where it makes the tokens of the word those of the question (" tree" and "'tree" are cut in
        # different places), so that a small model has only to copy them. The count is the same with it.
        _, output = count_by_tool(word, letter)
        code = f" '{word}'.count('{letter}')" if quote else f"' {word}'.count('{letter}')"
        return tool_answer(code, output, f"{letter} in {quote}{word}{quote}: {output}")

    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        judge = same_final_number if self.settings.long_form else same_last_number
        return judge(conversation, answer)


def same_final_number(conversation: Conversation, answer: Content) -> bool:
    """Whether what an answer says behind its last ``####`` ends on the number of the reference."""
    _, mark, final = text_of(answer).rpartition("####")
    return bool(mark) and same_last_number(conversation, final)


def letter_to_count(random: Random, word: str) -> str:
    """A letter of the word, or, one time in ten, any of the alphabet."""
    of_word = random.random() < _LETTER_OF_WORD_SHARE
    return random.choice(word if of_word else string.ascii_lowercase)


def count_by_tool(word: str, letter: str) -> tuple[str, str]:
    """The expression that counts a letter in a word, and what the tool makes of it."""
    code = f"'{word}'.count('{letter}')"
    output = evaluate(code)
    assert output is not None, code
    return code, output


def spelled(word: str) -> str:
    """A word and its letters: ``apple:a,p,p,l,e``."""
    return f"{word}:{','.join(word)}"


def walked(word: str, letter: str) -> str:
    """The letters of a word one by one, with a running count of one of them."""
    count, lines = 0, []
    for place, found in enumerate(word, start=1):
        count += found == letter
        lines.append(f"{place}:{found} {count}" if found == letter else f"{place}:{found}")
    return "\n".join(lines)
