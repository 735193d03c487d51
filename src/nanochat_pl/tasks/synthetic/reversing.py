"""Reversing words. Those of the test part are the words that the other tasks about words hold out, too."""

from __future__ import annotations

from dataclasses import dataclass

from nanochat_pl.common.schema import setting
from nanochat_pl.tasks.base import Completion, Content, Conversation, conversation_of, generator, reference_of, text_of
from nanochat_pl.tasks.registry import task
from nanochat_pl.tasks.synthetic.places import reward_of_places
from nanochat_pl.tasks.synthetic.words import WordSettings, WordTask

_WORDINGS = (
    "Reverse the word: {word}",
    "Reverse {word}",
    "reverse {word}",
    "Write {word} backwards.",
    "Spell {word} backwards",
    "What is {word} read from its end?",
)


@dataclass(frozen=True)
class ReversingSettings(WordSettings):
    """``Reverse the word: apple``; words of the corpus."""

    min_letters: int = setting(5, "Shortest word.", at_least=1)
    max_letters: int = setting(8, "Longest word.", at_least=1, at_most=40)
    spaced: bool = setting(False, "A blank between all letters, in question and answer: each is a token of its own.")
    partial_reward: bool = setting(False, "Reward of a wrong answer: the share of places that are right, instead of 0.")


@task("reversing", ReversingSettings)
class Reversing(WordTask):
    """``Reverse the word: apple`` → ``elppa``. Right if these are the answer's letters, in this order.

    Capitals, and what stands between or around the letters, make no difference; other letters do.
    """

    key = "reversing"
    settings: ReversingSettings

    def conversation(self, index: int) -> Conversation:
        word = self.word(index)
        between = " " if self.settings.spaced else ""
        question = generator(self.name, self.split, index).choice(_WORDINGS).format(word=between.join(word))
        return conversation_of(question, between.join(reversed(word)))

    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        return _letters_of(answer) == _letters_of(reference_of(conversation))

    def reward(self, conversation: Conversation, completion: Completion) -> float:
        expected = _letters_of(reference_of(conversation))
        return reward_of_places(expected, _letters_of(completion.content), self.settings.partial_reward)


def _letters_of(answer: Content) -> list[str]:
    return [letter for letter in text_of(answer).lower() if letter.isalpha()]
