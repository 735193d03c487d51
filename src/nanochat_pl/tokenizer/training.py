"""Training a tokenizer: the most frequent pair of neighbours becomes a token, again and again.

Hugging Face's ``tokenizers`` does the counting. Its merges alone are taken over; ids are ours: the 256 bytes by value,
then the merges in the order in which they were found, then the special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.schema import setting
from nanochat_pl.tokenizer.bpe import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from nanochat_pl.tokenizer.file_format import unspell
from nanochat_pl.tokenizer.ranks import MAX_TOKEN_BYTES, MAX_VOCAB_SIZE, NUM_BYTES


@dataclass(frozen=True)
class TokenizerSettings:
    """How a tokenizer is trained (config group ``tokenizer``)."""

    vocab_size: int = setting(
        32_768,
        "Number of token ids: 256 bytes, merges, 9 special tokens.",
        at_least=NUM_BYTES + len(SPECIAL_TOKENS),
        at_most=MAX_VOCAB_SIZE,
    )
    max_chars: int = setting(2_000_000_000, "Characters of text to train on, at most.", at_least=1)
    max_chars_per_document: int = setting(10_000, "Characters after which each document is cut.", at_least=1)


def train_tokenizer(
    texts: Iterable[str],
    settings: TokenizerSettings,
    on_progress: Callable[[int], None] | None = None,
    show_bars: bool = False,
) -> Tokenizer:
    """Train a tokenizer. The same texts in the same order give the same tokenizer.

    Args:
        texts: documents; reading stops at ``settings.max_chars``.
        on_progress: called with the number of characters read so far, after each document.
        show_bars: let the library show, on standard error, how far counting and merging are.

    Raises:
        UserError: the text has fewer different pairs than ``settings.vocab_size`` asks for. The vocabulary is not
            quietly made smaller: the shape of the model and its plan follow from it.
    """
    trained = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated", invert=False)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=show_bars,
    )
    trained.train_from_iterator(_bounded(texts, settings, on_progress), trainer)
    merges = json.loads(trained.to_str())["model"]["merges"]
    # As a dict: a token that two merges make has the place of the first.
    tokens = list(dict.fromkeys([bytes([value]) for value in range(NUM_BYTES)] + [unspell(a + b) for a, b in merges]))
    if (reached := len(tokens) + len(SPECIAL_TOKENS)) < settings.vocab_size:
        least = NUM_BYTES + len(SPECIAL_TOKENS)
        raise UserError(
            f"tokenizer.vocab_size={settings.vocab_size}: the text to train on has pairs for no more than {reached:,}.",
            fix=f"Set tokenizer.vocab_size={least + (reached - least) // 2} or so (at"
            " the limit a token may be a whole document), or give more text (data.path=…, tokenizer.max_chars=…).",
        )
    return Tokenizer(tokens, SPLIT_PATTERN)


def _bounded(
    texts: Iterable[str], settings: TokenizerSettings, on_progress: Callable[[int], None] | None
) -> Iterator[str]:
    """The texts, cut as the settings say."""
    num_chars = 0
    for text in texts:
        text = text[: min(settings.max_chars_per_document, settings.max_chars - num_chars)]
        # Lone surrogates have no UTF-8; Tokenizer.encode reads them in the same way.
        yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        num_chars += len(text)
        if on_progress:
            on_progress(num_chars)
        if num_chars >= settings.max_chars:
            return
