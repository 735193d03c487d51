"""Which items of evaluation sets stand in the training text: 13-grams of words that both have.

The way of the filter of GPT-3 (arXiv 2005.14165, appendix C): words in lower case without punctuation; a gram that
more than ten training documents have is taken for a common phrase and not counted. Only the evaluation sets are kept in
memory, as hashes; of the training text one batch at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nanochat_pl.data.near_duplicates import gram_hashes, words_of

GRAM_WORDS = 13
MAX_TRAINING_DOCUMENTS = 10
MAX_SET_CHARS = 20_000_000  # of each evaluation set; a larger one is sampled
_SHOWN_WORDS = 20


@dataclass(frozen=True)
class Overlap:
    """What of one evaluation set stands in the training text.

    Attributes:
        items: that were looked at, of ``items_in_all``.
        short: those of fewer words than a gram, of which nothing can be said.
        overlapping: items of which the training text has at least one gram.
        common: items that have only such grams in common with it as are common phrases.
        gram_share: share of the grams of all items that the training text has.
        example: the words in common of the first such item, empty without one.
        example_item, example_document: the numbers of that item and of the training document.
        example_place: where that document is, for people.
    """

    name: str
    items: int
    items_in_all: int
    short: int
    overlapping: int
    common: int
    gram_share: float
    example: str = ""
    example_item: int = -1
    example_document: int = -1
    example_place: str = ""

    @property
    def share(self) -> float:
        """Share of the items that overlap, of those that are long enough to tell."""
        return self.overlapping / max(self.items - self.short, 1)


class OverlapCounter:
    """Counts the grams that training documents and evaluation sets have in common."""

    def __init__(self, sets: Mapping[str, Sequence[str]]) -> None:
        self._sets = {name: _sample(items) for name, items in sets.items()}
        self._sizes = {name: len(items) for name, items in sets.items()}
        self._vocabulary: dict[str, int] = {}  # words of the evaluation sets, from 1 on; 0: any other
        self._item_grams: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, chosen in self._sets.items():
            for _, text in chosen:
                for word in words_of(text):
                    self._vocabulary.setdefault(word, len(self._vocabulary) + 1)
            self._item_grams[name] = self._grams([text for _, text in chosen])
        everything = [hashes for hashes, _ in self._item_grams.values()]
        self._hashes = np.unique(np.concatenate(everything)) if everything else np.zeros(0, np.uint64)
        self._documents = np.zeros(len(self._hashes), np.int64)  # training documents that have each gram
        self._first_document = np.full(len(self._hashes), np.iinfo(np.int64).max)
        # A look at one bit spares nearly all grams of the training text the search among the hashes.
        self._bits = np.uint64(max(16, min(27, len(self._hashes).bit_length() + 3)))
        self._may_be = np.zeros(1 << int(self._bits), bool)
        self._may_be[self._hashes >> (np.uint64(64) - self._bits)] = True

    def add(self, numbers: Sequence[int], texts: Sequence[str]) -> None:
        """Count training documents, each given once, by number."""
        hashes, text = self._grams(texts)
        candidates = self._may_be[hashes >> (np.uint64(64) - self._bits)]
        hashes, text = hashes[candidates], text[candidates]
        places = np.searchsorted(self._hashes, hashes)
        found = places < len(self._hashes)
        found[found] = self._hashes[places[found]] == hashes[found]
        pairs = np.unique(places[found] * len(texts) + text[found])  # a gram counts once a document
        gram, document = pairs // max(len(texts), 1), np.asarray(numbers)[pairs % max(len(texts), 1)]
        np.add.at(self._documents, gram, 1)
        np.minimum.at(self._first_document, gram, document)

    def results(self) -> list[Overlap]:
        """What was found of each set, in their order."""
        return [self._result(name) for name in self._sets]

    def _result(self, name: str) -> Overlap:
        chosen, (hashes, item) = self._sets[name], self._item_grams[name]
        places = np.searchsorted(self._hashes, hashes)
        documents = self._documents[places]
        seen = (documents > 0) & (documents <= MAX_TRAINING_DOCUMENTS)
        has_grams, overlaps, met = (
            np.bincount(item[which], minlength=len(chosen)) > 0 for which in (slice(None), seen, documents > 0)
        )
        example, example_item, example_document = "", -1, -1
        if seen.any():
            number = int(np.argmax(overlaps))
            mine = np.flatnonzero(item == number)
            first, last = _longest_run(seen[mine])
            # An item's grams are all of its neighbours: its words are the vocabulary's, so none was left out.
            shown = words_of(chosen[number][1])[first : last + GRAM_WORDS]
            example = " ".join(shown[:_SHOWN_WORDS])
            example_item = chosen[number][0]
            example_document = int(self._first_document[places[mine[first]]])
        return Overlap(
            name=name,
            items=len(chosen),
            items_in_all=self._sizes[name],
            short=int((~has_grams).sum()),
            overlapping=int(overlaps.sum()),
            common=int((met & ~overlaps).sum()),
            gram_share=float(seen.mean()) if len(seen) else 0.0,
            example=example,
            example_item=example_item,
            example_document=example_document,
        )

    def _grams(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of all grams whose words are known, uint64, and the number of the text that each is from, int64."""
        ids: list[int] = []
        ends = []
        for text in texts:
            ids.extend(self._vocabulary.get(word, 0) for word in words_of(text))
            ids.append(0)  # no gram goes from one text into the next
            ends.append(len(ids))
        words = np.array(ids, np.uint64)
        unknown = np.concatenate([np.zeros(GRAM_WORDS, np.int64), np.cumsum(words == 0)])[GRAM_WORDS - 1 :]
        starts = np.flatnonzero(unknown[GRAM_WORDS:] == unknown[:-GRAM_WORDS])
        return gram_hashes(words, GRAM_WORDS)[starts], np.searchsorted(np.array(ends, np.int64), starts, side="right")


def _longest_run(flags: np.ndarray) -> tuple[int, int]:
    """The first and the last place of the longest run of true ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    begins, ends = edges[::2], edges[1::2]
    longest = int(np.argmax(ends - begins))
    return int(begins[longest]), int(ends[longest]) - 1


def _sample(items: Sequence[str]) -> list[tuple[int, str]]:
    """Items with their numbers: all, or evenly spread ones of about MAX_SET_CHARS together."""
    num_chars = sum(map(len, items))
    kept = len(items) if num_chars <= MAX_SET_CHARS else max(1, len(items) * MAX_SET_CHARS // num_chars)
    return [(number, items[number]) for number in (np.arange(kept) * len(items) // max(kept, 1)).tolist()]
