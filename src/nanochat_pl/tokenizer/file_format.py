"""``tokenizer.json``: the file format of Hugging Face's ``tokenizers``, written and strictly read.

The format can say much more than our tokenizers need. A file is accepted only if it is what we would have written
for the tokens and the pattern found in it: so nothing in it is overlooked, and other readers give the same ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from reprlib import repr as quote  # shortens
from typing import Any

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.files import read_json, write_json
from nanochat_pl.tokenizer.ranks import MAX_VOCAB_SIZE, NUM_BYTES, merges_of

# A vocabulary of a million tokens fits.
MAX_FILE_BYTES = 128 * 2**20


def write(path: Path, tokens: Sequence[bytes], pattern: str, special_tokens: Sequence[str]) -> None:
    """Write the tokens (bytes by id), the split pattern and the special tokens, whose ids follow.

    Raises:
        UserError: a token is not reached by merging earlier ones, or the file cannot be written.
    """
    try:
        merges = merges_of(tokens)
    except ValueError as error:
        raise UserError(f"{path}: the tokenizer cannot be written: {error}.") from error
    spelled = [(spell(left), spell(right)) for left, right in merges]
    write_json(path, _document([spell(token) for token in tokens], spelled, pattern, special_tokens))


def read(path: Path, special_tokens: Sequence[str]) -> tuple[list[bytes], str]:
    """Read tokens (bytes by id) and split pattern.

    Raises:
        UserError: the file is missing, too large, no JSON, or differs from what :func:`write` writes.
    """
    document = read_json(path, MAX_FILE_BYTES)
    try:
        return _parse(document, special_tokens)
    except ValueError as error:
        raise UserError(f"{path}: is no tokenizer of nanochat_pl: {error}") from error


def _parse(document: Any, special_tokens: Sequence[str]) -> tuple[list[bytes], str]:
    model = _at(document, "model", dict)
    tokens = _tokens_by_id(_at(model, "vocab", dict))
    merges = _merges(_at(model, "merges", list), tokens)
    splits = _at(_at(document, "pre_tokenizer", dict), "pretokenizers", list)
    pattern = _at(_at(splits[0] if splits else None, "pattern", dict), "Regex", str)
    _compare(document, _document(tokens, merges, pattern, special_tokens), "")
    return [unspell(token) for token in tokens], pattern


def _at(values: Any, key: str, kind: type) -> Any:
    if not isinstance(values, dict) or not isinstance(values.get(key), kind):
        raise ValueError(f"{key!r} is missing or of the wrong type.")
    return values[key]


def _tokens_by_id(vocab: dict[str, Any]) -> list[str]:
    """The spelled tokens by id; ids must be 0 … n-1."""
    if len(vocab) > MAX_VOCAB_SIZE:
        raise ValueError(f"model.vocab has {len(vocab):,} entries, more than {MAX_VOCAB_SIZE:,}.")
    tokens: list[str | None] = [None] * len(vocab)
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < len(tokens) or tokens[index] is not None:
            raise ValueError(
                f"model.vocab gives the id {quote(index)} to {quote(token)}: ids must be 0 … {len(tokens) - 1:,}."
            )
        tokens[index] = token
    return [token for token in tokens if token is not None]


def _merges(merges: list[Any], tokens: Sequence[str]) -> list[tuple[str, str]]:
    """The merges, each of which must make the token of its place out of two earlier ones."""
    made = tokens[NUM_BYTES:]
    if len(merges) != len(made):
        raise ValueError(f"model.merges has {len(merges):,} entries where the vocabulary needs {len(made):,}.")
    ids = {token: index for index, token in enumerate(tokens)}
    for place, (pair, token) in enumerate(zip(merges, made, strict=True)):
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        known = is_pair and all(ids.get(part, len(ids)) < NUM_BYTES + place for part in pair)
        if not known or pair[0] + pair[1] != token:
            raise ValueError(f"model.merges[{place}]={quote(pair)} does not make {quote(token)} of two earlier tokens.")
    return [(left, right) for left, right in merges]


def _compare(found: Any, expected: Any, where: str) -> None:
    """Raise ValueError at the first place where a file is not what we write."""
    if isinstance(expected, Mapping) and isinstance(found, dict):
        for key in [*expected, *found]:
            place = f"{where}.{key}" if where else str(key)
            if key not in expected or key not in found:
                raise ValueError(f"{quote(place)} {'is missing' if key in expected else 'is not expected'}.")
            # Vocabulary and merges were checked entry by entry already.
            if place not in ("model.vocab", "model.merges"):
                _compare(found[key], expected[key], place)
    elif isinstance(expected, list) and isinstance(found, list):
        if len(found) != len(expected):
            raise ValueError(f"{where} has {len(found):,} entries, not {len(expected):,}.")
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            _compare(one, other, f"{where}[{i}]")
    elif type(found) is not type(expected) or found != expected:
        raise ValueError(f"{where} is {quote(found)}, not {quote(expected)}.")


def _document(
    tokens: Sequence[str], merges: Iterable[tuple[str, str]], pattern: str, special_tokens: Sequence[str]
) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(len(tokens) + i, name) for i, name in enumerate(special_tokens)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token is that token, as in tiktoken
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }


def _added_token(index: int, name: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": name, **flags}


@cache
def byte_alphabet() -> str:
    """The character that stands for each byte in a file: printable ones for themselves, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(NUM_BYTES))


def spell(token: bytes) -> str:
    """A token's bytes as the characters that stand for them."""
    alphabet = byte_alphabet()
    return "".join(alphabet[byte] for byte in token)


def unspell(text: str) -> bytes:
    """The inverse of :func:`spell`. Raises ValueError for a character that stands for no byte."""
    values = _byte_values()
    try:
        return bytes(values[character] for character in text)
    except KeyError as error:
        raise ValueError(
            f"the token {text!r} has the character {error.args[0]!r}, which stands for no byte."
        ) from error


@cache
def _byte_values() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_alphabet())}
