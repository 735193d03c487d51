"""The words that are spelled and whose letters are counted: those of the corpus, or a list of one's own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import write_text
from nanochat_pl.common.schema import UserGlob, setting
from nanochat_pl.data.files.read import lines_of
from nanochat_pl.data.sources.python_docs import PythonDocs
from nanochat_pl.tasks.base import Split, Task, TaskSettings, generator, limits, own_settings, part_of
from nanochat_pl.tasks.context import MIXTURE, TaskContext
from nanochat_pl.tasks.published.dataset_files import HubSet, SetFile, files_of_set, files_on_disk, require_all

# A run of lower-case letters that stands as prose: not joined to an underscore, digit, quote, bracket or dot as
# names in code are. A full stop behind it is the end of a sentence unless a letter follows.
_PROSE_WORD = re.compile(r"(?<![\w.`'\"/\\\-:@=(\[])[a-z]+(?![\w`'\"/\\\-=(\[\]:@]|\.\w)")
_RULE_VERSION = 1
_LIST_SUFFIXES = (".txt", ".txt.gz", ".txt.zst")


@dataclass(frozen=True)
class WordSettings(TaskSettings):
    """Which words: by default those of the prose of python_docs."""

    min_letters: int = setting(3, "Shortest word.", at_least=1)
    max_letters: int = setting(12, "Longest word.", at_least=1, at_most=40)
    min_documents: int = setting(1, "In how many documents of python_docs a word must occur.", at_least=1)
    words_path: UserGlob | None = setting(None, "A list of words instead, one a line: text file, folder or glob.")
    words_repo: str | None = setting(None, "Or a data set on the hub with such a file: OWNER/NAME.")
    words_files: str = setting("*.txt", "Glob for the files of words_repo.")

    def __post_init__(self) -> None:
        problems = []
        if self.min_letters > self.max_letters:
            problems.append(f"min_letters={self.min_letters}: is above max_letters={self.max_letters}.")
        if self.words_path is not None and self.words_repo is not None:
            problems.append("words_path: and words_repo are both given; leave one of them out.")
        if self.min_documents > 1 and (self.words_path or self.words_repo):
            problems.append(f"min_documents={self.min_documents}: is about python_docs; a list of words is given.")
        if problems:
            raise UserError(problems)


class WordTask(Task):
    """A task about one word at a time. Which words are held out is a matter of each word's hash, alike for all tasks.

    Attributes:
        key: the name that it is registered with.
        words: those of its split, in a seeded order, so that any number from the first on is an even sample.
    """

    key: ClassVar[str]

    def __init__(self, settings: Any, split: Split, words: Sequence[str], where: str = MIXTURE) -> None:
        """
        Args:
            settings: of this task, a :class:`WordSettings`.
            split: which words.
            words: all of them, held-out ones too.
            where: the group that the task is a key of, for messages.

        Raises:
            UserError: there are none for this part.
        """
        chosen = part_of(sorted(set(words)), split, "word")
        if not chosen:
            raise UserError(
                f"{where}.{self.key}: there are no words for its {split} part.",
                fix="Allow shorter and longer ones (min_letters, max_letters), lower min_documents, or give a list.",
            )
        generator(self.key, "words", split).shuffle(chosen)
        self.settings, self.words = settings, chosen
        start, size, step = limits(self.key, settings, split, len(chosen), len(chosen), where)
        super().__init__(self.key, split, size, start, step)

    @classmethod
    def from_settings(cls, settings: WordSettings, split: Split, context: TaskContext) -> Task:
        return cls(settings, split, words_of(f"{context.where}.{cls.key}", settings, context), context.where)

    def made_of(self) -> Any:
        return [own_settings(self.settings, WordSettings), self.words]

    def word(self, index: int) -> str:
        """The word that conversation ``index`` is about; the words are gone round."""
        return self.words[index % len(self.words)]


def words_of(where: str, settings: WordSettings, context: TaskContext) -> tuple[str, ...]:
    """The words that the settings mean.

    Args:
        where: the key of the task, for messages.
        settings: which words.
        context: where the corpus and data sets of the hub are.

    Raises:
        UserError: a list is not here, cannot be read or has no words.
    """
    if settings.words_path is not None:
        files = files_on_disk(f"{where}.words_path", settings.words_path, _LIST_SUFFIXES)
    elif settings.words_repo is not None:
        wanted = HubSet(settings.words_repo, files=settings.words_files, prefix="words_")
        files = files_of_set(where, wanted, _LIST_SUFFIXES, context)
        require_all(where, files, wanted, context)
    else:
        return corpus_words(context.corpus, settings)
    return listed_words(files, settings)


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


def listed_words(files: Iterable[SetFile], settings: WordSettings) -> tuple[str, ...]:
    """The words of lists, in small letters, sorted, each once. Lines with anything but letters are passed over.

    Raises:
        UserError: a list is no UTF-8, or has no word of the length that the settings want.
    """
    words: set[str] = set()
    for file in files:
        assert file.path is not None, "files that are not here have been refused"
        before = len(words)
        for number, line in enumerate(lines_of(file.path), 1):
            try:
                word = line.decode("utf-8").strip().lower()
            except UnicodeDecodeError as error:
                raise UserError(f"{file.path}: line {number:,} is not UTF-8.") from error
            if word.isalpha() and settings.min_letters <= len(word) <= settings.max_letters:
                words.add(word)
        if len(words) == before:
            bounds = f"{settings.min_letters} to {settings.max_letters} letters"
            raise UserError(f"{file.path}: has no words of {bounds} that are not elsewhere; one word a line is read.")
    return tuple(sorted(words))


def count_documents(texts: list[str]) -> Counter[str]:
    """In how many of the texts each prose word occurs."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(set(_PROSE_WORD.findall(text)))
    return counts
