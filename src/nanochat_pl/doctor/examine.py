"""What is in the data of a stage: lengths, copies, odd text. Read from what a training would read: the token cache.

Of everything: numbers of tokens, and exact copies. Of ``max_documents`` evenly spread documents: what their text says.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nanochat_pl.data.files.txt import SEPARATOR
from nanochat_pl.doctor.documents import Documents, shortened
from nanochat_pl.doctor.overlap import Overlap, OverlapCounter

MAX_REPEATED_LINES = 0.3  # share of a document's lines that repeat another: more is junk (arXiv 2112.11446, table A1)
NUM_LONGEST = 3
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x80-\x9f]")
_BATCH, _BATCH_CHARS = 256, 4_000_000

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Lengths:
    """How long documents are."""

    total: int
    median: float
    mean: float
    p95: float
    longest: int

    @classmethod
    def of(cls, lengths: np.ndarray) -> Lengths:
        """Of documents that have a length; all zero where there are none."""
        if not len(lengths):
            return cls(0, 0.0, 0.0, 0.0, 0)
        return cls(
            int(lengths.sum(dtype=np.int64)),
            float(np.median(lengths)),
            float(lengths.mean()),
            float(np.percentile(lengths, 95)),
            int(lengths.max()),
        )


@dataclass(frozen=True)
class SplitMetrics:
    """One split: training or validation.

    Attributes:
        documents: all, empty ones too.
        empty: those without a token: empty, blank, or left out.
        tokens: of the others, without bos.
        distinct: those that are neither empty nor the copy of an earlier one.
        sampled: of these, those whose text was read: what all of the following is about.
        characters: of these.
        bytes_per_token: UTF-8 bytes of text per token.
        non_ascii_share: characters outside of ASCII.
        replaced: documents with U+FFFD, the mark of text that was decoded wrongly.
        repeating: documents with more than MAX_REPEATED_LINES of their lines repeated.
        longest: where the longest documents are, their tokens, how they begin.
        target_share: share of the tokens that are trained on.
        controls: documents with control characters that no text has: NULs and the like.
        separators: documents with a separator of documents as letters.
    """

    documents: int
    empty: int
    tokens: Lengths
    distinct: int
    sampled: int
    characters: Lengths
    bytes_per_token: float
    non_ascii_share: float
    replaced: int
    repeating: int
    longest: list[tuple[str, int, str]]
    target_share: float = 1.0
    controls: int = 0
    separators: int = 0


@dataclass(frozen=True)
class Duplicates:
    """Documents that are the same, to the token.

    Attributes:
        copies: training documents that are the same as an earlier one.
        copied_tokens: share of the training tokens that are in these.
        wanted: of these, those that the settings ask for (a task's ``repeat``).
        validation_copies: validation documents that are training documents too.
        examples: kind of duplicate → the two places and how the text begins.
    """

    copies: int
    copied_tokens: float
    wanted: int
    validation_copies: int
    examples: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What was found in the documents of a stage."""

    train: SplitMetrics
    validation: SplitMetrics
    duplicates: Duplicates
    overlaps: list[Overlap]


class _Texts(Sequence[str]):
    """The text of some documents, each read when it is asked for."""

    def __init__(self, documents: Documents, numbers: np.ndarray) -> None:
        self._documents, self._numbers = documents, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        return self._documents.text(int(self._numbers[index]))


def num_reads(splits: Sequence[Documents], max_documents: int) -> int:
    """Documents that :func:`examine` goes through, each pass counted."""
    return sum(len(each.lengths) + min(len(each.lengths), max_documents) for each in splits)


def examine(
    train: Documents,
    validation: Documents,
    eval_sets: dict[str, Sequence[str]],
    max_documents: int,
    wanted_copies: int = 0,
    validation_is_a_set: bool = True,
    advance: Advance = lambda amount: None,
) -> Found:
    """Read the documents of a stage.

    Args:
        max_documents: of each split, whose text is read.
        wanted_copies: copies of training documents that the settings ask for.
        validation_is_a_set: of evaluation, too; false where ``eval_sets`` hold what it is made of.
        advance: called with the number of documents just done, of :func:`num_reads` in all.
    """
    digests = [_digests(documents, advance) for documents in (train, validation)]
    first_of = [
        _first_of_copies(digest, documents.lengths)
        for digest, documents in zip(digests, (train, validation), strict=True)
    ]
    distinct = [np.flatnonzero(first == np.arange(len(first))) for first in first_of]
    samples = [_spread(numbers, max_documents) for numbers in distinct]
    held_out = {"validation": _Texts(validation, samples[1])} if validation_is_a_set else {}
    counter = OverlapCounter({**held_out, **eval_sets})
    return Found(
        _read(train, len(distinct[0]), samples[0], advance, counter.add),
        _read(validation, len(distinct[1]), samples[1], advance),
        _duplicates(train, validation, digests, first_of[0], wanted_copies),
        [
            replace(overlap, example_place=train.place(overlap.example_document)) if overlap.example else overlap
            for overlap in counter.results()
        ],
    )


def _digests(documents: Documents, advance: Advance) -> np.ndarray:
    """64 bits of a hash of each document, uint64."""
    digests = np.zeros(len(documents.lengths), np.uint64)
    for first in range(0, len(digests), _BATCH):
        batch = range(first, min(first + _BATCH, len(digests)))
        for number in batch:
            digest = hashlib.blake2b(documents.content(number), digest_size=8).digest()
            digests[number] = int.from_bytes(digest, "little")
        advance(len(batch))
    return digests


def _first_of_copies(digests: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """For each document the number of the first one that is the same; -1 for an empty one."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return np.where(lengths > 0, first[inverse.reshape(-1)], -1)


def _spread(numbers: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the numbers, evenly spread."""
    kept = min(len(numbers), most)
    return numbers[np.arange(kept) * len(numbers) // max(kept, 1)]


def _duplicates(
    train: Documents, validation: Documents, digests: Sequence[np.ndarray], first_of: np.ndarray, wanted: int
) -> Duplicates:
    examples = {}
    copies = np.flatnonzero((first_of != np.arange(len(first_of))) & (train.lengths > 0))
    if len(copies):
        number = int(copies[np.argmax(train.lengths[copies])])
        places = f"{train.place(int(first_of[number]))} = {train.place(number)}"
        examples["copy"] = f"{places}: {shortened(train.text(number))}"
    leaked = np.flatnonzero(np.isin(digests[1], digests[0][train.lengths > 0]) & (validation.lengths > 0))
    if len(leaked):
        number = int(leaked[np.argmax(validation.lengths[leaked])])
        source = int(np.flatnonzero((digests[0] == digests[1][number]) & (train.lengths > 0))[0])
        places = f"{train.place(source)} = {validation.place(number)}"
        examples["copy in validation"] = f"{places}: {shortened(validation.text(number))}"
    return Duplicates(
        copies=len(copies),
        copied_tokens=float(train.lengths[copies].sum() / max(train.lengths.sum(dtype=np.int64), 1)),
        wanted=wanted,
        validation_copies=len(leaked),
        examples=examples,
    )


def _read(
    documents: Documents,
    distinct: int,
    numbers: np.ndarray,
    advance: Advance,
    look: Callable[[Sequence[int], Sequence[str]], None] = lambda numbers, texts: None,
) -> SplitMetrics:
    """Read the text of some documents, and show it to ``look``."""
    chars, num_bytes, non_ascii, replaced, repeating, controls, separators = [], 0, 0, 0, 0, 0, 0
    for batch, texts in _batches(documents, numbers):
        for text in texts:
            chars.append(len(text))
            num_bytes += len(text.encode("utf-8", "replace"))
            non_ascii += 0 if text.isascii() else len(text) - len(text.encode("ascii", "ignore"))
            replaced += "\ufffd" in text
            controls += _CONTROL.search(text) is not None
            separators += SEPARATOR.search(text) is not None
            repeating += _share_of_repeated_lines(text) > MAX_REPEATED_LINES
        look(batch, texts)
        advance(len(batch))
    lengths, characters = documents.lengths, np.array(chars, np.int64)
    longest = np.argsort(-lengths, kind="stable")[:NUM_LONGEST].tolist()
    return SplitMetrics(
        documents=len(lengths),
        empty=int((lengths == 0).sum()),
        tokens=Lengths.of(lengths[lengths > 0]),
        distinct=distinct,
        sampled=len(numbers),
        characters=Lengths.of(characters),
        bytes_per_token=num_bytes / max(int(lengths[numbers].sum(dtype=np.int64)), 1),
        non_ascii_share=non_ascii / max(int(characters.sum()), 1),
        replaced=replaced,
        repeating=repeating,
        longest=[(documents.place(n), int(lengths[n]), shortened(documents.text(n))) for n in longest if lengths[n]],
        target_share=documents.target_share,
        controls=controls,
        separators=separators,
    )


def _batches(documents: Documents, numbers: np.ndarray) -> Iterator[tuple[list[int], list[str]]]:
    """Numbers and texts, as many at a time as a batch may have documents and characters."""
    batch: list[int] = []
    texts: list[str] = []
    for number in numbers.tolist():
        batch.append(number)
        texts.append(documents.text(number))
        if len(batch) == _BATCH or sum(map(len, texts)) > _BATCH_CHARS:
            yield batch, texts
            batch, texts = [], []
    if batch:
        yield batch, texts


def _share_of_repeated_lines(text: str) -> float:
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0
