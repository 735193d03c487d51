"""Bytes per token of a tokenizer beside GPT-2's and GPT-4's, on given texts.

Theirs come with no package: tiktoken downloads them once and finds them in its cache from then on. Nothing is
downloaded here unless asked for (:func:`fetch_others`), nothing waits for long, and what cannot be had is said in its
row. The texts of :data:`KINDS` were written for this package.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

import tiktoken

from nanochat_pl.common.console import print_table, rank_zero_print
from nanochat_pl.common.errors import UserError
from nanochat_pl.tokenizer.bpe import Tokenizer, encode_ordinary

KINDS = ("news", "korean", "code", "math", "science")
DOWNLOAD_SECONDS = 300.0
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


def texts_of_kinds() -> dict[str, str]:
    """A short text of each of :data:`KINDS`."""
    folder = Path(__file__).parent / "texts"
    return {kind: (folder / f"{kind}.txt").read_text(encoding="utf-8") for kind in KINDS}


@dataclass(frozen=True)
class ComparisonRow:
    """One tokenizer's metrics.

    Attributes:
        name: whose tokenizer it is.
        vocab_size: number of its ids; 0 where it was skipped.
        bytes_per_token: UTF-8 bytes per token, by the text's name: more is better. Empty texts are left out.
        skipped: why there are no metrics, as ``skipped: …``; else empty.
    """

    name: str
    vocab_size: int
    bytes_per_token: dict[str, float]
    skipped: str = ""


def compare_tokenizers(
    tokenizer: Tokenizer, texts: Mapping[str, str], allow_download: bool = False, timeout_seconds: float = 20.0
) -> list[ComparisonRow]:
    """Metrics of a tokenizer and, where they can be loaded, of GPT-2's and GPT-4's.

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


def comparison_table(rows: Sequence[ComparisonRow], texts: Mapping[str, str]) -> tuple[list[str], list[list[Any]]]:
    """The metrics by text: heading and lines, those of the tokenizers that were skipped left out.

    After the bytes of a text and each tokenizer's bytes per token comes, for each of the others, how many tokens the
    first takes for one of theirs: below 1 it needs fewer.
    """
    ours, *others = [row for row in rows if not row.skipped]
    heading = ["text", "bytes", *(f"bytes per token, {row.name}" for row in (ours, *others))]
    heading += [f"{ours.name} for one token of {row.name}" for row in others]
    lines = []
    for name, metric in ours.bytes_per_token.items():
        metrics = [metric, *(row.bytes_per_token[name] for row in others)]
        lines.append([name, _num_bytes(texts[name]), *metrics, *(each / metric for each in metrics[1:])])
    return heading, lines


def print_comparison(
    heading: Sequence[str], lines: Sequence[Sequence[Any]], skipped: Mapping[str, str], title: str = ""
) -> None:
    """A line for each text, as :func:`comparison_table` gives them; tokenizers that were skipped are named below."""
    shown = [[name, f"{num_bytes:,}", *(f"{metric:.2f}" for metric in metrics)] for name, num_bytes, *metrics in lines]
    print_table(heading, shown, title=title)
    for name, why in skipped.items():
        rank_zero_print(f"{name}: {why}")


def cached_others() -> list[str]:
    """Names of the other tokenizers whose files tiktoken's cache has."""
    return [other.name for other in _OTHERS if _is_cached(other)]


def fetch_others() -> tuple[Path, list[str]]:
    """Have the files of the other tokenizers in tiktoken's cache, which verifies them.

    Returns:
        the cache folder, and the names of those that were fetched now.

    Raises:
        UserError: one cannot be fetched; or tiktoken is told to keep nothing.
    """
    folder = _cache_folder()
    if folder is None:
        raise UserError("TIKTOKEN_CACHE_DIR: is empty, so tiktoken keeps no file.", "Unset it, or name a folder in it.")
    missing = [other for other in _OTHERS if not _is_cached(other)]
    for other in missing:
        encoding = _load(other, allow_download=True, timeout_seconds=DOWNLOAD_SECONDS)
        if isinstance(encoding, str) or not _is_cached(other):
            reason = encoding if isinstance(encoding, str) else f"its files are not in {folder} afterwards"
            raise UserError(
                f"{other.name}: {reason}.",
                "Without a network: set TIKTOKEN_CACHE_DIR to a copy of a folder that another machine has fetched.",
            )
    return folder, [other.name for other in missing]


def _num_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _bytes_per_token(encode: Callable[[str], list[int]], texts: Mapping[str, str]) -> dict[str, float]:
    return {name: _num_bytes(text) / len(encode(text)) for name, text in texts.items() if text}


def _load(other: _Other, allow_download: bool, timeout_seconds: float) -> tiktoken.Encoding | str:
    """The tokenizer, or why there is none."""
    if not allow_download and not _is_cached(other):
        return "not in tiktoken's cache; nanochat-pl download tokenizers=true fetches it"
    answers: Queue[tiktoken.Encoding | str | BaseException] = Queue()

    def load() -> None:
        try:
            answers.put(tiktoken.get_encoding(other.encoding))
        except (OSError, ValueError, ImportError) as error:
            answers.put(f"it cannot be loaded: {str(error)[:200]}")
        except BaseException as error:  # raised below, where somebody waits
            answers.put(error)

    # tiktoken waits for the network without end: a thread of its own can be left behind.
    Thread(target=load, daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_seconds)
    except Empty:
        return f"it was not loaded within {timeout_seconds:g} seconds"
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _is_cached(other: _Other) -> bool:
    """Whether tiktoken's cache has all files of a tokenizer: each is named after the SHA-1 of its address."""
    names = [hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest() for url in other.urls]
    return (folder := _cache_folder()) is not None and all((folder / name).is_file() for name in names)


def _cache_folder() -> Path | None:
    """Where tiktoken keeps files; None: it is told to keep none."""
    default = str(Path(tempfile.gettempdir()) / "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    return Path(folder) if folder else None
