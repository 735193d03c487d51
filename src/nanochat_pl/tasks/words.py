"""The words of the corpus: what is spelled and what letters are counted in."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import write_text
from nanochat_pl.common.settings import setting
from nanochat_pl.data.python_docs import PythonDocs
from nanochat_pl.tasks.base import TaskSettings


@dataclass(frozen=True)
class WordSettings(TaskSettings):
    """Which words of the corpus."""

    min_letters: int = setting(3, "Shortest word.", at_least=1)
    max_letters: int = setting(12, "Longest word.", at_least=1, at_most=40)
    min_documents: int = setting(1, "In how many documents of python_docs a word must occur.", at_least=1)

    def __post_init__(self) -> None:
        if self.min_letters > self.max_letters:
            raise UserError(f"min_letters={self.min_letters}: is above max_letters={self.max_letters}.")


# A run of lower-case letters that stands as prose: not joined to an underscore, digit, quote, bracket or dot as
# names in code are. A full stop behind it is the end of a sentence unless a letter follows.
_PROSE_WORD = re.compile(r"(?<![\w.`'\"/\\\-:@=(\[])[a-z]+(?![\w`'\"/\\\-=(\[\]:@]|\.\w)")
_RULE_VERSION = 1


def corpus_words(corpus: PythonDocs, settings: WordSettings) -> tuple[str, ...]:
    """Words of the corpus's training part, sorted, as the settings bound them.

    Counted once and kept in the corpus's folder.
    """
    path = corpus.folder / f"words-{_RULE_VERSION}.txt"
    if not path.exists():
        counts = count_documents([document.text for document in corpus.documents("train")])
        write_text(path, "".join(f"{word} {count}\n" for word, count in sorted(counts.items())))
    pairs = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    return tuple(
        word
        for word, count in pairs
        if settings.min_letters <= len(word) <= settings.max_letters and int(count) >= settings.min_documents
    )


def count_documents(texts: list[str]) -> Counter[str]:
    """In how many of the texts each prose word occurs."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(set(_PROSE_WORD.findall(text)))
    return counts
