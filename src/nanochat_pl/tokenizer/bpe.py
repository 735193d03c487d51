"""The tokenizer: byte-level BPE, run by tiktoken, kept as a list of byte strings in the order of their ids.

A token's id is its rank: among the pairs of neighbours in a piece of text, the one whose concatenation has the lowest
rank is merged first. So the ranks and the pattern that cuts text into pieces are all that there is to a tokenizer;
merges are derived from them where a file format asks for merges.

Text is always ordinary text. Special tokens enter by id only (see ``chat_format``), so whoever types ``<|bos|>``
gets the letters and never the token.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import tiktoken

from nanochat_pl.common.errors import UserError
from nanochat_pl.tokenizer import chat_format, file_format
from nanochat_pl.tokenizer.chat_format import Conversation, Part
from nanochat_pl.tokenizer.ranks import problem_of_ranks

# How text is cut before merging: contractions, words, digits by two, punctuation, line ends, blanks.
SPLIT_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s+"""
)

# The same cuts, found in about half the time (docs/LOG.md): tiktoken's regex engine is faster at what neither looks
# ahead nor is possessive, so that stands in one group. The two possessive quantifiers can be left out: what they repeat
# and what follows have no character in common, so there is nothing to give back.
_FAST_SPLIT_PATTERN = (
    r"""(?:'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n])|\s+(?!\S)|\s+"""
)

# Their ids follow the last merge, in this order.
SPECIAL_TOKENS: tuple[str, ...] = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)

# The regex engine inside tiktoken panics in blanks of about a million characters: `\s+(?!\S)` backtracks through them.
# Merging within a word of 50 MB takes minutes, in pieces of this length seconds.
LONGEST_RUN = 2**16
_LONG_RUN = re.compile(rf"\s{{{LONGEST_RUN}}}|\S{{{LONGEST_RUN}}}")
_BLANK, _SIGN = re.compile(r"\s"), re.compile(r"\S")

# Texts or conversations that a thread takes at a time: enough to hide the cost of handing them over.
_ITEMS_PER_TASK = 256

# What a split pattern must cut without losing a byte, before it is trusted; where it is not our own (whose alternatives
# cover letters, numbers, blanks and the rest), every character there is besides.
_PROBE = "It's 12345 naïve tests,\tOK?\r\n\n  你好 🌍\u00a0e\u0301\x00\ufffd  x " + " ".join(c * 40 for c in "a1 !\n")

A = TypeVar("A")
B = TypeVar("B")


class Tokenizer:
    """A trained tokenizer. Nothing in it changes after it is made; it may be shared by threads and pickled.

    Args:
        tokens: the bytes of each ordinary token, by id; the first 256 are the single bytes, in any order.
        pattern: regular expression that cuts text into the pieces within which tokens are merged.

    Attributes:
        vocab_size: number of ids, special ones included.
        bos_id: id of ``<|bos|>``, which begins every document and conversation.
        special_ids: id of each special token, by its name.
    """

    def __init__(self, tokens: Sequence[bytes], pattern: str) -> None:
        if problem := problem_of_ranks(tokens, pattern):
            raise UserError(f"tokenizer: {problem}")
        self.tokens: tuple[bytes, ...] = tuple(tokens)
        self.pattern = pattern
        self.special_ids = {name: len(self.tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.bos_id = self.special_ids["<|bos|>"]
        self.vocab_size = len(self.tokens) + len(SPECIAL_TOKENS)
        self._encoding = _checked_encoding(self.tokens, pattern, self.special_ids)

    @classmethod
    def from_ranks(
        cls, mergeable_ranks: Mapping[bytes, int], pattern: str, special_tokens: Mapping[str, int]
    ) -> Tokenizer:
        """A tokenizer from what tiktoken and the reference keep: rank by bytes, pattern, id by special token.

        Raises:
            UserError: ranks that are not 0 … n-1, or special tokens other than ours, or in another order.
        """
        tokens = sorted(mergeable_ranks, key=lambda token: mergeable_ranks[token])
        if [mergeable_ranks[token] for token in tokens] != list(range(len(tokens))):
            raise UserError("tokenizer: the ranks are not 0, 1, 2 … without gaps and repetitions.")
        expected = {name: len(tokens) + i for i, name in enumerate(SPECIAL_TOKENS)}
        if dict(special_tokens) != expected:
            raise UserError(f"tokenizer: the special tokens must be {expected}, not {dict(special_tokens)}.")
        return cls(tokens, pattern)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a ``tokenizer.json``; it may come from an untrusted source.

        Raises:
            UserError: the file is missing, or anything in it is not as :meth:`save` writes it; names file and place.
        """
        tokens, pattern = file_format.read(path, SPECIAL_TOKENS)
        try:
            return cls(tokens, pattern)
        except UserError as error:
            raise UserError([f"{path}: {problem}" for problem in error.problems]) from error

    def save(self, path: Path) -> None:
        """Write a ``tokenizer.json`` that ``tokenizers`` and ``transformers`` read too and that gives the same ids.

        Raises:
            UserError: a token cannot be reached by merging (never so for trained ones), or the disk refuses.
        """
        file_format.write(path, self.tokens, self.pattern, SPECIAL_TOKENS)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides about ids: tokens in order, pattern, special tokens. Names cached data."""
        digest = hashlib.sha256()
        for part in (self.pattern.encode(), *(name.encode() for name in SPECIAL_TOKENS), *self.tokens):
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each id stands for, int32 (V,); 0 for special tokens.

        They are counted on the raw bytes: a token may end inside a character. For any text that can be encoded as
        UTF-8, the sum over its ids is the number of its UTF-8 bytes.
        """
        lengths = np.array([len(token) for token in self.tokens] + [0] * len(SPECIAL_TOKENS), dtype=np.int32)
        lengths.flags.writeable = False
        return lengths

    def encode(self, text: str) -> list[int]:
        """The ids of a text, taken as ordinary text: no special token, and no bos in front.

        Surrogates without a partner, which UTF-8 cannot hold, become U+FFFD. Blanks, and words without any, that are
        far longer than ``LONGEST_RUN`` characters are cut to that length.

        Raises:
            UserError: the split pattern, one from elsewhere, passes over parts of this text or cannot be run on it.
        """
        with _panics_explained(self.pattern):
            ids = encode_ordinary(self._encoding, text)
        self._require_whole(text, sum(map(self._num_bytes.__getitem__, ids)))
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """:meth:`encode` as uint32 (number of ids,). No Python object is made per id: less memory, and less time in
        the interpreter's lock, where many threads encode."""
        with _panics_explained(self.pattern):
            ids = _encode_array(self._encoding, text)
        self._require_whole(text, int(self.token_bytes.take(ids).sum()))
        return ids

    @cached_property
    def _num_bytes(self) -> list[int]:
        return [int(size) for size in self.token_bytes]

    def _require_whole(self, text: str, num_bytes: int) -> None:
        """What no alternative of a pattern matches is passed over without a word, so the bytes are counted."""
        if missing := _utf8_length(text) - num_bytes:
            raise UserError(
                f"tokenizer: the split pattern {self.pattern!r} loses {missing:,} bytes of the text that begins with"
                f" {text[:40]!r}.",
                "Take a tokenizer whose pattern has an alternative for every character.",
            )

    def encode_batch(self, texts: Iterable[str], num_threads: int = 8) -> list[list[int]]:
        """:meth:`encode` for each of many texts, by several threads. The result does not depend on their number."""
        return _map_in_threads(self.encode, texts, num_threads)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The raw bytes of some ids; a special token gives its name. Raises KeyError for an id that does not exist."""
        return self._encoding.decode_bytes(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids. Bytes that are no UTF-8, such as half a character at the end, give U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def render_conversation(self, conversation: Conversation, max_tokens: int = 2048) -> tuple[list[int], list[int]]:
        """Ids and training mask of a conversation: see :func:`chat_format.render_conversation`."""
        return chat_format.render_conversation(self, conversation, max_tokens)

    def render_conversations(
        self, conversations: Iterable[Conversation], max_tokens: int = 2048, num_threads: int = 8
    ) -> list[tuple[list[int], list[int]]]:
        """:meth:`render_conversation` for each of many conversations, by several threads."""
        render = partial(self.render_conversation, max_tokens=max_tokens)
        return _map_in_threads(render, conversations, num_threads)

    def render_for_completion(self, conversation: Conversation, max_tokens: int | None = None) -> list[int]:
        """The prompt that the assistant is to answer: see :func:`chat_format.render_for_completion`."""
        return chat_format.render_for_completion(self, conversation, max_tokens)

    def parse_assistant(self, ids: Sequence[int]) -> list[Part]:
        """The parts of what an assistant has generated: see :func:`chat_format.parse_assistant`."""
        return chat_format.parse_assistant(self, ids)


def _map_in_threads(function: Callable[[A], B], items: Iterable[A], num_threads: int) -> list[B]:
    """The function's results in the order of the items.

    Threads are worth it where tiktoken, outside of the interpreter's lock, does most of the work: for long texts.
    """
    items = list(items)
    if num_threads <= 1 or len(items) <= _ITEMS_PER_TASK:
        return [function(item) for item in items]
    tasks = [items[i : i + _ITEMS_PER_TASK] for i in range(0, len(items), _ITEMS_PER_TASK)]
    with ThreadPoolExecutor(num_threads) as threads:
        results = threads.map(lambda task: [function(item) for item in task], tasks)
        return [result for task in results for result in task]


def encode_ordinary(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """The ids that an encoding of tiktoken gives to a text; endless blanks and words are cut to LONGEST_RUN."""
    pieces = _pieces(text)
    if len(pieces) == 1:
        return encoding.encode_ordinary(text)
    return [token for piece in pieces for token in encoding.encode_ordinary(piece)]


def _encode_array(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    try:
        arrays = [encoding.encode_to_numpy(piece, disallowed_special=()) for piece in _pieces(text)]
    except UnicodeEncodeError:  # half of a surrogate pair: only the way by lists replaces it
        return np.array(encode_ordinary(encoding, text), dtype=np.uint32)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _pieces(text: str) -> list[str]:
    if len(text) < LONGEST_RUN or not (cuts := _cuts(text)):
        return [text]
    return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _cuts(text: str) -> list[int]:
    """Where a text has to be cut so that no blank and no word is much longer than LONGEST_RUN characters."""
    # A run of twice that length fills one of these stretches: a look at each spares nearly all texts the search.
    for start in range(0, len(text) - LONGEST_RUN + 1, LONGEST_RUN):
        stretch = start, start + LONGEST_RUN
        if not (_BLANK.search(text, *stretch) and _SIGN.search(text, *stretch)):
            return [match.end() for match in _LONG_RUN.finditer(text)]
    return []


def _utf8_length(text: str) -> int:
    """Bytes of a text as it is encoded: half of a surrogate pair counts as U+FFFD, in whose place it is."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return len(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode())


@contextlib.contextmanager
def _panics_explained(pattern: str) -> Iterator[None]:
    """A regex that gives up panics in Rust: a PanicException, which cannot be imported, or a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException" and "Regex error" not in str(error):
            raise
        raise UserError(f"tokenizer: the split pattern {pattern!r} cannot be run: {error}") from error


def _checked_encoding(tokens: Sequence[bytes], pattern: str, special_ids: dict[str, int]) -> tiktoken.Encoding:
    """tiktoken's form of a tokenizer, whose pattern has been proved to compile and to lose no character."""
    if problem := _problem_of_pattern(pattern):
        raise UserError(f"tokenizer: the split pattern {pattern!r} {problem}")
    ranks = {token: rank for rank, token in enumerate(tokens)}
    pattern = _FAST_SPLIT_PATTERN if pattern == SPLIT_PATTERN else pattern
    return tiktoken.Encoding("nanochat_pl", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_ids)


@cache
def _problem_of_pattern(pattern: str) -> str:
    """What keeps a pattern from being used, empty where nothing does.

    What it does to a character can depend on those around it, so encoding counts its bytes all the same.
    """
    bytes_alone = {bytes([value]): value for value in range(256)}  # merging takes time and loses nothing
    try:
        encoding = tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=bytes_alone, special_tokens={})
        with _panics_explained(pattern):
            texts = [_PROBE] if pattern == SPLIT_PATTERN else [_PROBE, *_every_character()]
            for text in texts:
                kept = bytes(encoding.encode_ordinary(text)).decode("utf-8", "replace")
                if kept != text:
                    lost = next(sign for sign, there in zip(text, [*kept, ""], strict=False) if sign != there)
                    return f"loses parts of a text: {lost!r} (U+{ord(lost):04X})."
    except ValueError as error:
        return f"is no regular expression: {error}"
    except UserError as error:
        return f"cannot be run: {error.__cause__}"
    return ""


def _every_character() -> Iterator[str]:
    """All there are, in texts that are short enough for a pattern to be run on."""
    for start in range(0, 0x110000, 2**12):
        yield "".join(map(chr, (code for code in range(start, start + 2**12) if not 0xD800 <= code < 0xE000)))
