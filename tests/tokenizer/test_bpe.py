"""Encoding and decoding: golden ids, exact byte counts, any text, any number of threads."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken

from nanochat_pl.common.errors import UserError
from nanochat_pl.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from nanochat_pl.tokenizer.bpe import _FAST_SPLIT_PATTERN, LONGEST_RUN

SPECIALS_AS_TEXT = "".join(SPECIAL_TOKENS)
ODD_TEXTS = [
    "",
    " ",
    "\x00",
    "\r\n\r\n",
    "e\u0301",
    "\ufeff",
    "👩‍👩‍👧",
    "ﬁ ſ K",
    "a\u2028b\u0085c",
    SPECIALS_AS_TEXT,
    "x" * 5000,
]


@pytest.fixture(scope="module")
def real_texts(shared: Path) -> list[str]:
    """Texts in many scripts, code, numbers, blanks, and 73 odd cases."""
    folder = shared / "data" / "tokenizer_texts"
    texts = [path.read_bytes().decode("utf-8") for path in sorted(folder.glob("*.txt"))]
    cases = (folder / "cases.jsonl").read_text(encoding="utf-8").splitlines()
    return texts + [json.loads(line)["text"] for line in cases]


def random_texts(count: int) -> list[str]:
    generator = random.Random(5)
    alphabet = "ab '\n\r\t1!é你🌍\u00a0\u0301\u2003" + "".join(
        chr(generator.randrange(0x20, 0xD800)) for _ in range(60)
    )
    return ["".join(generator.choices(alphabet, k=generator.randrange(60))) for _ in range(count)]


def test_golden_encodings(golden: Path, golden_tokenizer: Tokenizer) -> None:
    cases = json.loads((golden / "encodings.json").read_text(encoding="utf-8"))
    assert len(cases) == 11
    for case in cases:
        assert golden_tokenizer.encode(case["text"]) == case["ids"], case["text"]


def test_golden_vocabulary(golden: Path, golden_tokenizer: Tokenizer) -> None:
    torch = pytest.importorskip("torch")
    expected = torch.load(golden / "nanochat_base" / "tokenizer" / "token_bytes.pt", weights_only=True)
    assert golden_tokenizer.token_bytes.tolist() == expected.tolist()
    assert golden_tokenizer.vocab_size == 1000
    assert golden_tokenizer.bos_id == 991
    assert golden_tokenizer.pattern == SPLIT_PATTERN


def test_real_texts_come_back_and_their_bytes_are_counted(real_texts: list[str], golden_tokenizer: Tokenizer) -> None:
    assert len(real_texts) == 79
    for text in real_texts:
        ids = golden_tokenizer.encode(text)
        assert golden_tokenizer.decode(ids) == text
        assert golden_tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_the_fast_pattern_cuts_as_the_one_that_is_kept(real_texts: list[str], golden_tokenizer: Tokenizer) -> None:
    fast, kept = regex.compile(_FAST_SPLIT_PATTERN), regex.compile(SPLIT_PATTERN)
    # A letter, a number, a blank, a line's end … and what only one of two similar classes holds.
    short = map("".join, itertools.product("aÉ1² \n\r\t'sſL!\u0301\u00a0\u2028", repeat=3))
    texts = [*ODD_TEXTS, *real_texts, *random_texts(2000), *short]
    for text in texts:
        assert fast.findall(text) == kept.findall(text), repr(text)
    ranks = {token: rank for rank, token in enumerate(golden_tokenizer.tokens)}
    slow = tiktoken.Encoding("slow", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in texts:
        assert golden_tokenizer.encode(text) == slow.encode_ordinary(text), repr(text)


def test_special_tokens_in_a_text_are_ordinary_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(SPECIALS_AS_TEXT)
    assert max(ids) < tokenizer.bos_id
    assert tokenizer.encode_batch([SPECIALS_AS_TEXT]) == [ids]


def test_special_ids_come_last_in_the_recipes_order(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_ids == {name: 311 + i for i, name in enumerate(SPECIAL_TOKENS)}
    assert tokenizer.decode([tokenizer.bos_id]) == "<|bos|>"


def test_unpaired_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udc00")) == "a\ufffdb\ufffd"
    assert tokenizer.decode(tokenizer.encode("\ud83c\udf0d")) == "🌍"
    assert tokenizer.decode(tokenizer.encode_batch(["\udfff"])[0]) == "\ufffd"


@pytest.mark.parametrize("blank", [" ", "\n", " \u2003", "\t\r\n"])
def test_long_blanks_do_not_end_the_program(tokenizer: Tokenizer, blank: str) -> None:
    """tiktoken's regex panics (an exception that `except Exception` does not catch) in blanks of a million."""
    text = "a" + blank * (1_100_000 // len(blank)) + "b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_endless_words_are_cut_to_pieces(tokenizer: Tokenizer) -> None:
    """Merging in a word of 50 MB took minutes and gigabytes."""
    word = "the" * LONGEST_RUN
    pieces = [word[start : start + LONGEST_RUN] for start in range(0, len(word), LONGEST_RUN)]
    assert tokenizer.encode(word) == [token for piece in pieces for token in tokenizer.encode(piece)]
    assert tokenizer.decode(tokenizer.encode(f"a few words {word} and more")) == f"a few words {word} and more"


def test_only_runs_over_the_limit_are_cut(tokenizer: Tokenizer) -> None:
    below = "a" * 10 + " " * (LONGEST_RUN - 1) + "b"
    assert tokenizer.encode(below) == tokenizer._encoding.encode_ordinary(below)
    prose = "some words, " * 10_000
    assert tokenizer.encode(prose) == tokenizer._encoding.encode_ordinary(prose)


def test_a_batch_gives_the_same_for_any_number_of_threads(tokenizer: Tokenizer) -> None:
    texts = random_texts(1500)
    expected = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(iter(texts), num_threads=1) == expected
    assert tokenizer.encode_batch(texts, num_threads=5) == expected
    assert tokenizer.encode_batch([]) == []


def test_half_a_character_is_decoded_as_a_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\u2022")
    assert tokenizer.decode_bytes(ids[:2]) == "\u2022".encode()[:2]
    assert tokenizer.decode(ids[:2]) == "\ufffd"


def test_an_id_that_does_not_exist_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(KeyError):
        tokenizer.decode([tokenizer.vocab_size])


def test_fingerprint_depends_on_everything_that_decides_about_ids(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.tokens
    swapped = (*tokens[:-2], tokens[-1], tokens[-2])
    other_pattern = SPLIT_PATTERN.replace("{1,2}", "{1,3}")
    others = [
        Tokenizer(swapped, SPLIT_PATTERN),
        Tokenizer(tokens[:-1], SPLIT_PATTERN),
        Tokenizer(tokens, other_pattern),
    ]
    assert len({tokenizer.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert Tokenizer(tokens, SPLIT_PATTERN).fingerprint == tokenizer.fingerprint


def test_fingerprint_is_stable(golden_tokenizer: Tokenizer) -> None:
    """Caches on disk are named after it."""
    assert golden_tokenizer.fingerprint == "05a8eaf146d3eace1738dc1e99a2e0d00bda29b7cc57c9ae254de09a5afbe977"


def test_can_be_sent_to_another_process(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("Hello there 42") == tokenizer.encode("Hello there 42")
    assert copy.fingerprint == tokenizer.fingerprint


BYTES = [bytes([value]) for value in range(256)]


@pytest.mark.parametrize(
    ("tokens", "pattern", "word"),
    [
        (BYTES[:255], SPLIT_PATTERN, "255 tokens"),
        ([*BYTES[:255], b"ab"], SPLIT_PATTERN, "single bytes"),
        ([*BYTES, b"ab", b"ab"], SPLIT_PATTERN, "twice"),
        ([*BYTES, b""], SPLIT_PATTERN, "empty"),
        ([*BYTES, b"a" * 1000], SPLIT_PATTERN, "1,000 bytes"),
        (BYTES, "", "0 characters"),
        (BYTES, "a" * 1001, "1,001 characters"),
        (BYTES, "(", "no regular expression"),
        (BYTES, "[a-z]+", "loses"),
        (BYTES, r"(?!q)[\s\S]", r"loses parts of a text: 'q' \(U\+0071\)"),
        (BYTES, r"[^\x{E000}-\x{E010}]+", r"U\+E000"),
        (BYTES, r"[^\x{10FFFF}]+", r"U\+10FFFF"),
        (BYTES, r"[^\r]+", "loses"),
        (BYTES, r"(?:)|[\s\S]", "cannot be run"),
        (BYTES, r"(?=z)|[\s\S]", "'z'"),
        (BYTES, r"(?:(?=(\s|\S))\1)*?(?!)|(\S*)*\2$", "cannot be run"),
    ],
)
def test_impossible_tokenizers_are_refused(tokens: list[bytes], pattern: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        Tokenizer(tokens, pattern)


def test_our_own_pattern_covers_every_character() -> None:
    """So that is not proved again wherever a tokenizer is read."""
    tokenizer = Tokenizer(BYTES, SPLIT_PATTERN)
    characters = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert tokenizer.decode_bytes(tokenizer.encode(characters)) == characters.encode()


@pytest.mark.parametrize("text", ["the cat zzzcz sat", "größer zzzcz 🌍", "\ud83d zzzcz"])
def test_what_a_pattern_loses_in_some_places_only_is_noticed_in_every_text(text: str) -> None:
    tokenizer = Tokenizer(BYTES, r"(?<!zzz)[\s\S]")
    for encode in (tokenizer.encode, tokenizer.encode_array):
        assert len(encode(text.replace("z", "y")))
        with pytest.raises(UserError, match="loses 1 bytes of the text that begins with"):
            encode(text)


def test_a_pattern_that_cannot_be_run_on_a_text_is_an_error_there() -> None:
    tokenizer = Tokenizer(BYTES, r"zz(?:(a|aa|b)\1?)*c|[\s\S]")
    for encode in (tokenizer.encode, tokenizer.encode_array):
        assert len(encode("zzaaaa")) == 6
        with pytest.raises(UserError, match="cannot be run"):
            encode("zz" + "a" * 200)


def test_from_ranks_checks_ranks_and_special_tokens() -> None:
    ranks = {token: rank for rank, token in enumerate(BYTES)}
    special = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
    assert Tokenizer.from_ranks(ranks, SPLIT_PATTERN, special).vocab_size == 265
    with pytest.raises(UserError, match="ranks"):
        Tokenizer.from_ranks({**ranks, b"ab": 300}, SPLIT_PATTERN, special)
    with pytest.raises(UserError, match="special tokens"):
        Tokenizer.from_ranks(ranks, SPLIT_PATTERN, {**special, "<|more|>": 265})
    with pytest.raises(UserError, match="special tokens"):
        Tokenizer.from_ranks(ranks, SPLIT_PATTERN, {name: 264 - i for i, name in enumerate(SPECIAL_TOKENS)})


@pytest.mark.parametrize("text", [*ODD_TEXTS, "half of a pair: \ud83d!", " " * 200_000 + "x", "größer 🌍" * 50])
def test_arrays_hold_the_same_ids(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_array(text)
    assert ids.dtype == np.uint32 and ids.tolist() == tokenizer.encode(text)
