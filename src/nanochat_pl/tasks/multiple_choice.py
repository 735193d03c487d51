"""Multiple choice in a chat: a question with lettered choices, answered by a letter alone."""

from __future__ import annotations

from collections.abc import Sequence

from nanochat_pl.tasks.base import Content, Conversation, Task, conversation_of, reference_of, text_of


class MultipleChoice(Task):
    """A task whose answers are letters. Its conversations are made by :func:`choice_conversation`.

    A model is asked by the logits of the letters, so an answer is one of them: right if it is the reference's.
    """

    kind = "categorical"

    def evaluate(self, conversation: Conversation, answer: Content) -> bool:
        return text_of(answer).strip() == reference_of(conversation)

    def letters(self, conversation: Conversation) -> Sequence[str]:
        return list(conversation["letters"])


def choice_conversation(question: str, letters: Sequence[str], choices: Sequence[str], answer: str) -> Conversation:
    """A conversation of a multiple-choice question: the letters go along with the messages.

    Args:
        question: as it is asked.
        letters: of the choices, in their order.
        choices: as many.
        answer: the right one of the letters.
    """
    assert answer in letters, f"{answer!r} is none of {letters}"
    return {**conversation_of(render_choices(question, letters, choices), answer), "letters": list(letters)}


def render_choices(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """The user's message. No blank stands before a letter: ``=A`` ends on the token that ``A`` alone is.

    With " A" it would be another token than the one that the answer begins with, and a small model had to learn that
    the two mean the same.
    """
    lines = [f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True)]
    return (
        f"Multiple Choice question: {question}\n{''.join(lines)}\nRespond only with the letter of the correct answer."
    )
