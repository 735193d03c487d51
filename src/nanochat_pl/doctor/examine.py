"""What is in the data of a stage: lengths, duplicates, odd text. Read from what a training would read: the token cache.

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
from nanochat_pl.data.near_duplicates import seen_before
from nanochat_pl.doctor.documents import Documents, shortened
from nanochat_pl.doctor.overlap import Overlap, OverlapCounter

MAX_REPEATED_LINES = 0.3  # share of a document's lines that repeat another: more is junk (arXiv 2112.11446, table A1)
MAX_SHARE_SEEN = 0.5  # of its 8-grams that earlier documents have: more makes a near duplicate
NUM_LONGEST = 3
MAX_NEAR_CHARS = 30_000_000  # of the text that is searched for near duplicates: what takes the memory
_MAX_NEAR_CHARS_A_TEXT = 100_000
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
class SplitFigures:
    """One split: training or validation.

    Attributes:
        documents: all, empty ones too.
        empty: those without a token: empty, blank, or left out.
        tokens: of the others, without bos; None where there are no tokens yet.
        distinct: those that are neither empty nor the copy of an earlier one.
        sampled: of these, those whose text was read: what all of the following is about.
        characters: of these.
        bytes_per_token: UTF-8 bytes of text per token.
        non_ascii_share: characters outside of ASCII.
        replaced: documents with U+FFFD, the mark of text that was decoded wrongly.
        repeating: documents with more than MAX_REPEATED_LINES of their lines repeated.
        longest: where the longest documents are, their tokens (characters, where there are none), how they begin.
        target_share: share of the tokens that are trained on.
        controls: documents with control characters that no text has: NULs and the like.
        separators: documents with a separator of documents as letters.
    """

    documents: int
    empty: int
    tokens: Lengths | None
    distinct: int
    sampled: int
    characters: Lengths
    bytes_per_token: float | None
    non_ascii_share: float
    replaced: int
    repeating: int
    longest: list[tuple[str, int, str]]
    target_share: float = 1.0
    controls: int = 0
    separators: int = 0


@dataclass(frozen=True)
class Duplicates:
    """Documents that say the same.

    Attributes:
        copies: training documents that are the same as an earlier one, to the token.
        copied_tokens: share of the training tokens that are in these.
        wanted: of these, those that the settings ask for (a task's ``repeat``).
        validation_copies: validation documents that are training documents too.
        near_sampled, near_validation_sampled: documents that were searched for near duplicates, copies not among them.
        near, near_validation: those of which more than MAX_SHARE_SEEN stands in earlier ones, or in training documents.
        examples: kind of duplicate → the two places and how the text begins.
    """

    copies: int
    copied_tokens: float
    wanted: int
    validation_copies: int
    near_sampled: int
    near: int
    near_validation_sampled: int
    near_validation: int
    examples: dict[str, str] = field(default_factory=dict)


_Address = tuple[Documents, int]


class _Texts(Sequence[str]):
    """The text of some documents, each read when it is asked for."""

    def __init__(self, documents: Documents, numbers: np.ndarray) -> None:
        self._documents, self._numbers = documents, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        return self._documents.text(int(self._numbers[index]))


class Examination:
    """Reads the documents of a stage once, and knows then what :attr:`train`, :attr:`validation` … say.

    Args:
        train, validation: their documents.
        eval_sets: items of evaluation sets, by name.
        max_documents: of each split, whose text is read.
        wanted_copies: copies of training documents that the settings ask for.
        validation_is_a_set: of evaluation, too; false where ``eval_sets`` hold what it is made of.
        advance: called with the number of documents just done, of :meth:`work` in all.
    """

    def __init__(
        self,
        train: Documents,
        validation: Documents,
        eval_sets: dict[str, Sequence[str]],
        max_documents: int,
        wanted_copies: int = 0,
        validation_is_a_set: bool = True,
    ) -> None:
        self._validation_is_a_set = validation_is_a_set
        self._train, self._validation, self._eval_sets = train, validation, eval_sets
        self._max_documents, self._wanted = max_documents, wanted_copies

    @property
    def work(self) -> int:
        """Documents that are gone through, each pass counted."""
        sizes = [len(documents.lengths) for documents in (self._train, self._validation)]
        return sum(sizes) + sum(min(size, self._max_documents) for size in sizes)

    def run(self, advance: Advance = lambda amount: None) -> Found:
        """Read everything."""
        digests = [_digests(documents, advance) for documents in (self._train, self._validation)]
        first_of = [_first_of_copies(digest, documents.lengths) for digest, documents in self._both(digests)]
        distinct = [np.flatnonzero(first == np.arange(len(first))) for first in first_of]
        samples = [_spread(numbers, self._max_documents) for numbers in distinct]
        held_out = {"validation": _Texts(self._validation, samples[1])} if self._validation_is_a_set else {}
        counter = OverlapCounter({**held_out, **self._eval_sets})
        train = _read(self._train, len(distinct[0]), samples[0], advance, counter.add)
        validation = _read(self._validation, len(distinct[1]), samples[1], advance)
        overlaps = [
            replace(overlap, example_place=self._train.place(overlap.example_document)) if overlap.example else overlap
            for overlap in counter.results()
        ]
        return Found(train, validation, self._duplicates(digests, first_of, samples), overlaps)

    def _both(self, values: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, Documents]]:
        return zip(values, (self._train, self._validation), strict=True)

    def _duplicates(
        self, digests: Sequence[np.ndarray], first_of: Sequence[np.ndarray], samples: Sequence[np.ndarray]
    ) -> Duplicates:
        train, validation, examples = self._train, self._validation, {}
        copies = np.flatnonzero((first_of[0] != np.arange(len(first_of[0]))) & (train.lengths > 0))
        if len(copies):
            number = int(copies[np.argmax(train.lengths[copies])])
            examples["copy"] = _pair((train, int(first_of[0][number])), (train, number))
        leaked = np.flatnonzero(np.isin(digests[1], digests[0][train.lengths > 0]) & (validation.lengths > 0))
        if len(leaked):
            number = int(leaked[np.argmax(validation.lengths[leaked])])
            source = int(np.flatnonzero((digests[0] == digests[1][number]) & (train.lengths > 0))[0])
            examples["copy in validation"] = _pair((train, source), (validation, number))
        near = _near_duplicates(train, validation, samples[0], np.setdiff1d(samples[1], leaked), examples)
        return Duplicates(
            copies=len(copies),
            copied_tokens=float(train.lengths[copies].sum() / max(train.lengths.sum(dtype=np.int64), 1)),
            wanted=self._wanted,
            validation_copies=len(leaked),
            examples=examples,
            **near,
        )


@dataclass(frozen=True)
class Found:
    """What an examination found."""

    train: SplitFigures
    validation: SplitFigures
    duplicates: Duplicates
    overlaps: list[Overlap]


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


def _read(
    documents: Documents,
    distinct: int,
    numbers: np.ndarray,
    advance: Advance,
    look: Callable[[Sequence[int], Sequence[str]], None] = lambda numbers, texts: None,
) -> SplitFigures:
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
    tokens = int(lengths[numbers].sum(dtype=np.int64))
    return SplitFigures(
        documents=len(lengths),
        empty=int((lengths == 0).sum()),
        tokens=Lengths.of(lengths[lengths > 0]) if documents.counts_tokens else None,
        distinct=distinct,
        sampled=len(numbers),
        characters=Lengths.of(characters),
        bytes_per_token=num_bytes / max(tokens, 1) if documents.counts_tokens else None,
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


def _near_duplicates(
    train: Documents,
    validation: Documents,
    train_sample: np.ndarray,
    validation_sample: np.ndarray,
    examples: dict[str, str],
) -> dict[str, int]:
    """Near duplicates among the sampled documents, as keywords of :class:`Duplicates`."""
    room = MAX_NEAR_CHARS // 5
    held_out = _texts_within(validation, validation_sample, room)
    texts = _texts_within(train, train_sample, MAX_NEAR_CHARS - room)
    everything = [text for _, text in [*texts, *held_out]]
    shares, sources = seen_before(everything, among=len(texts))
    near = shares > MAX_SHARE_SEEN
    places = [(train, number) for number, _ in texts] + [(validation, number) for number, _ in held_out]
    for kind, first, last in (("near copy", 0, len(texts)), ("near copy in validation", len(texts), len(near))):
        if near[first:last].any():
            number = first + int(np.argmax(near[first:last]))
            examples[kind] = _pair(places[sources[number]], places[number])
    return {
        "near_sampled": len(texts),
        "near": int(near[: len(texts)].sum()),
        "near_validation_sampled": len(held_out),
        "near_validation": int(near[len(texts) :].sum()),
    }


def _texts_within(documents: Documents, numbers: np.ndarray, room: int) -> list[tuple[int, str]]:
    """Evenly spread documents of about so many characters together, long ones cut, with their numbers."""
    some = _spread(numbers, 100).tolist()
    per_unit = sum(len(documents.text(number)) for number in some) / max(int(documents.lengths[some].sum()), 1)
    num_chars = int(np.minimum(documents.lengths[numbers] * per_unit, _MAX_NEAR_CHARS_A_TEXT).sum())
    kept = _spread(numbers, len(numbers) * room // max(num_chars, room))
    return [(number, documents.text(number)[:_MAX_NEAR_CHARS_A_TEXT]) for number in kept.tolist()]


def _pair(first: _Address, copy: _Address) -> str:
    (documents, number), (others, other) = first, copy
    return f"{documents.place(number)} = {others.place(other)}: {shortened(others.text(other))}"
