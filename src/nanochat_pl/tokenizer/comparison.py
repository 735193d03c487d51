"""Bytes per token of a tokenizer beside GPT-2's and GPT-4's, on given texts.

Theirs come with no package: tiktoken downloads them once and finds them in its cache from then on. Nothing is
downloaded here unless asked for, nothing waits for long, and what cannot be had is said in its row.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

import tiktoken

from nanochat_pl.tokenizer.bpe import Tokenizer, encode_ordinary

_HOST = "https://openaipublic.blob.core.windows.net"


@dataclass(frozen=True)
class _Other:
    """A known tokenizer: its name for people, tiktoken's, and the files that tiktoken makes it of."""

    name: str
    encoding: str
    urls: tuple[str, ...]


_OTHERS = (
    _Other("GPT-2", "gpt2", (f"{_HOST}/gpt-2/encodings/main/vocab.bpe", f"{_HOST}/gpt-2/encodings/main/encoder.json")),
    _Other("GPT-4", "cl100k_base", (f"{_HOST}/encodings/cl100k_base.tiktoken",)),
)


@dataclass(frozen=True)
class ComparisonRow:
    """One tokenizer's figures.

    Attributes:
        name: whose tokenizer it is.
        vocab_size: number of its ids; 0 where it was skipped.
        bytes_per_token: UTF-8 bytes per token, by the text's name: more is better. Empty texts are left out.
        skipped: why there are no figures, as ``skipped: …``; else empty.
    """

    name: str
    vocab_size: int
    bytes_per_token: dict[str, float]
    skipped: str = ""


def compare_tokenizers(
    tokenizer: Tokenizer, texts: Mapping[str, str], allow_download: bool = False, timeout_seconds: float = 20.0
) -> list[ComparisonRow]:
    """Figures of a tokenizer and, where they can be loaded, of GPT-2's and GPT-4's.

    Args:
        texts: texts by name.
        allow_download: let tiktoken fetch (2 MB each) what its cache does not have.
        timeout_seconds: how long to wait for each of the others.
    """
    rows = [ComparisonRow("ours", tokenizer.vocab_size, _bytes_per_token(tokenizer.encode, texts))]
    for other in _OTHERS:
        encoding = _load(other, allow_download, timeout_seconds)
        if isinstance(encoding, str):
            rows.append(ComparisonRow(other.name, 0, {}, f"skipped: {encoding}"))
        else:
            rows.append(
                ComparisonRow(other.name, encoding.n_vocab, _bytes_per_token(partial(encode_ordinary, encoding), texts))
            )
    return rows


def _bytes_per_token(encode: Callable[[str], list[int]], texts: Mapping[str, str]) -> dict[str, float]:
    sizes = {name: len(text.encode("utf-8", "surrogatepass")) for name, text in texts.items()}
    return {name: sizes[name] / len(encode(text)) for name, text in texts.items() if text}


def _load(other: _Other, allow_download: bool, timeout_seconds: float) -> tiktoken.Encoding | str:
    """The tokenizer, or why there is none."""
    if not allow_download and not _is_cached(other):
        return "not in tiktoken's cache (TIKTOKEN_CACHE_DIR), and downloads are not allowed"
    answers: Queue[tiktoken.Encoding | str] = Queue()

    def load() -> None:
        try:
            answers.put(tiktoken.get_encoding(other.encoding))
        except (OSError, ValueError, ImportError) as error:
            answers.put(f"it cannot be loaded: {str(error)[:200]}")

    # tiktoken waits for the network without end: a thread of its own can be left behind.
    Thread(target=load, daemon=True).start()
    try:
        return answers.get(timeout=timeout_seconds)
    except Empty:
        return f"it was not loaded within {timeout_seconds:g} seconds"


def _is_cached(other: _Other) -> bool:
    """Whether tiktoken's cache has all files of a tokenizer: each is named after the SHA-1 of its address."""
    default = str(Path(tempfile.gettempdir()) / "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    names = [hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest() for url in other.urls]
    return folder != "" and all((Path(folder) / name).is_file() for name in names)
