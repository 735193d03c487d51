"""Near duplicates among texts, found by the 8-grams of words that they share with the texts before them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

GRAM_WORDS = 8
_WORD = re.compile(r"\w+")


def shares_seen_before(texts: Sequence[str]) -> np.ndarray:
    """For each text, the share of its 8-grams of words that some earlier text has too.

    Words are compared without case and punctuation. A text is filled up with ``GRAM_WORDS - 1`` empty words, so that
    each of its words begins a gram, and that the end of a text counts as well. Two grams are taken for the same where
    their 64-bit hashes are (for millions of grams a chance of one in a million that any two are mixed up).

    Args:
        texts: in the order of precedence: a copy counts against the later one.

    Returns:
        float64 (len(texts),): 0 for a text of new grams alone (or without words), 1 for a copy.
    """
    vocabulary: dict[str, int] = {}
    word_ids: list[int] = []
    num_words = np.zeros(len(texts), np.int64)
    for number, text in enumerate(texts):
        words = words_of(text)
        word_ids.extend(vocabulary.setdefault(word, len(vocabulary) + 1) for word in words)
        word_ids.extend([0] * (GRAM_WORDS - 1))
        num_words[number] = len(words)
    grams, gram_text = _grams(np.array(word_ids, np.uint64), num_words)

    order = np.argsort(grams, kind="stable")  # equal grams lie side by side, the earliest text first
    begins = np.ones(len(grams), bool)
    begins[1:] = grams[order][1:] != grams[order][:-1]
    first_text = np.zeros(len(grams), np.int64)
    first_text[order] = gram_text[order][begins][np.cumsum(begins) - 1]
    return np.bincount(gram_text, weights=first_text < gram_text, minlength=len(texts)) / np.maximum(num_words, 1)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def gram_hashes(word_ids: np.ndarray, size: int) -> np.ndarray:
    """A 64-bit hash of each ``size`` neighbours, uint64 (max(len(word_ids) - size + 1, 0),), of uint64 (num_words,)."""
    mixed = _mix(word_ids)
    hashes = np.zeros(max(len(mixed) - size + 1, 0), np.uint64)
    for offset in range(size):
        # Mixed again after each word: the order of the words counts.
        hashes = _mix(hashes + mixed[offset : offset + len(hashes)])
    return hashes


def _grams(word_ids: np.ndarray, num_words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all grams that begin with a word, uint64, and the text that each belongs to, int64."""
    gram_text = np.repeat(np.arange(len(num_words)), num_words)
    position = np.arange(len(gram_text)) + (GRAM_WORDS - 1) * gram_text
    return gram_hashes(word_ids, GRAM_WORDS)[position], gram_text


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers that spreads them evenly: the finaliser of SplitMix64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
