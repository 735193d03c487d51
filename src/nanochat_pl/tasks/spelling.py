"""Spelling words, and counting a letter in them through the tool.

The words of the test part occur in neither task's training part.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.settings import setting
from nanochat_pl.tasks.base import (
    Content,
    Conversation,
    Part,
    Split,
    Task,
    conversation_of,
    generator,
    limits,
    part_of,
    same_last_number,
    text_of,
    tool_answer,
)
from nanochat_pl.tasks.context import TaskContext
from nanochat_pl.tasks.registry import task
from nanochat_pl.tasks.words import WordSettings, corpus_words
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
# The reference's wording: half of all, and what the test part asks.
_PLAIN_SHARE = 0.5
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


def _words_of_split(words: Sequence[str], split: Split, name: str) -> list[str]:
    """The words of a split in a seeded order, so that any number from the first on is an even sample."""
    chosen = part_of(sorted(set(words)), split, "word")
    if not chosen:
        raise UserError(
            f"mixture.tasks.{name}: the corpus has no words for the {split} part.",
            fix=f"Lower mixture.tasks.{name}.min_documents, or allow shorter and longer words.",
        )
    generator(name, "words", split).shuffle(chosen)
    return chosen


@dataclass(frozen=True)
class SpellingSettings(WordSettings):
    """``Spell the word: apple``; words of the corpus."""


@task("spelling", SpellingSettings)
class Spelling(Task):
    """``Spell the word: apple`` → ``apple:a,p,p,l,e``. An answer is right if it is just this."""

    def __init__(self, settings: SpellingSettings, split: Split, words: Sequence[str]) -> None:
        """
        Args:
            settings: of this task.
            split: which words.
            words: all words; which of them are held out is a matter of each word's hash.
        """
        self.words = _words_of_split(words, split, "spelling")
        start, size = limits("spelling", settings, split, len(self.words), len(self.words))
        super().__init__("spelling", split, size, start)

    @classmethod
    def from_settings(cls, settings: SpellingSettings, split: Split, context: TaskContext) -> Spelling:
        return cls(settings, split, corpus_words(context.corpus, settings))

    def conversation(self, index: int) -> Conversation:
        word = self.words[index % len(self.words)]
        random = generator(self.name, self.split, index)
        plain = self.split == "test" or random.random() < _PLAIN_SHARE
        question = (_SPELL[0] if plain else random.choice(_SPELL)).format(word=word)
        return conversation_of(question, spelled(word))

    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        return text_of(answer).strip() == conversation["messages"][-1]["content"]


@dataclass(frozen=True)
class LetterCountingSettings(WordSettings):
    """``How many r are in strawberry?``; words of the corpus."""

    size: int | None = setting(6_000, "Training conversations; null: one for each word.", at_least=1)
    long_form: bool = setting(False, "Spell the word and walk through its letters before the tool is called.")


@task("letter_counting", LetterCountingSettings)
class LetterCounting(Task):
    """``How many r are in strawberry?``, by ``'strawberry'.count('r')``. Right if the answer ends on the number."""

    def __init__(self, settings: LetterCountingSettings, split: Split, words: Sequence[str]) -> None:
        """
        Args:
            settings: of this task.
            split: which words.
            words: all words; see :class:`Spelling`, with which the held-out words are shared.
        """
        self.words = _words_of_split(words, split, "letter_counting")
        self.settings = settings
        start, size = limits("letter_counting", settings, split, len(self.words), len(self.words))
        super().__init__("letter_counting", split, size, start)

    @classmethod
    def from_settings(cls, settings: LetterCountingSettings, split: Split, context: TaskContext) -> LetterCounting:
        return cls(settings, split, corpus_words(context.corpus, settings))

    def conversation(self, index: int) -> Conversation:
        word = self.words[index % len(self.words)]
        random = generator(self.name, self.split, index)
        of_word = random.random() < _LETTER_OF_WORD_SHARE
        letter = random.choice(word if of_word else string.ascii_lowercase)
        quote = random.choice(_QUOTES)
        question = random.choice(_COUNT).format(letter=f"{quote}{letter}{quote}", word=f"{quote}{word}{quote}")
        return conversation_of(question, self._answer(word, letter, quote))

    def _answer(self, word: str, letter: str, quote: str) -> list[Part]:
        if self.settings.long_form:
            code = f"'{word}'.count('{letter}')"
            walked = f"{spelled(word)}\n{_walk(word, letter)}\nLet me check: "
            output = _count(code)
            return [{"type": "text", "text": walked}, *tool_answer(code, output, f"\n#### {output}")]
        # A blank stands where it makes the tokens of the word those of the question (" tree" and "'tree" are cut in
        # different places), so that a small model has only to copy them. The count is the same with it.
        code = f" '{word}'.count('{letter}')" if quote else f"' {word}'.count('{letter}')"
        output = _count(code)
        return tool_answer(code, output, f"{letter} in {quote}{word}{quote}: {output}")

    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        if self.settings.long_form:
            _, mark, final = text_of(answer).rpartition("####")
            return bool(mark) and same_last_number(conversation, final)
        return same_last_number(conversation, answer)


def _count(code: str) -> str:
    output = evaluate(code)
    assert output is not None, code
    return output


def spelled(word: str) -> str:
    """A word and its letters: ``apple:a,p,p,l,e``."""
    return f"{word}:{','.join(word)}"


def _walk(word: str, letter: str) -> str:
    """The letters of a word one by one, with a running count of one of them."""
    count, lines = 0, []
    for place, found in enumerate(word, start=1):
        count += found == letter
        lines.append(f"{place}:{found} {count}" if found == letter else f"{place}:{found}")
    return "\n".join(lines)
