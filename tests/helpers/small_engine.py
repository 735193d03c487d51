"""Small models for tests of the engine: the golden checkpoint, and one that says what a script tells it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat_pl.model.config import GPTConfig, ModelSettings, resolve_model
from nanochat_pl.model.gpt import GPT
from nanochat_pl.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from tests.helpers.models import golden_net
from tests.reference.golden_tokenizer import load_golden_tokenizer


@dataclass(frozen=True)
class SmallBundle:
    """What the engine reads of a bundle."""

    net: GPT
    tokenizer: Tokenizer | None


@functools.cache
def golden_bundle(golden: Path) -> SmallBundle:
    """golden/nanochat_base: 4 layers, a short window of 128, vocabulary of 1,000."""
    return SmallBundle(golden_net(golden).eval(), load_golden_tokenizer(golden))


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """Every byte is a token, and the specials."""
    specials = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
    return Tokenizer.from_ranks({bytes([i]): i for i in range(256)}, SPLIT_PATTERN, specials)


def small_config(sequence_len: int = 128) -> GPTConfig:
    """A config for the byte tokenizer."""
    settings = ModelSettings(depth=1, aspect_ratio=8, head_dim=8, sequence_len=sequence_len)
    return resolve_model(settings, byte_tokenizer().vocab_size, compute_dtype="float32")


class ScriptedNet:
    """Stands in for a network: after a given history the next token is certain. Uses a real cache.

    Attributes:
        num_read: tokens that were run through it so far.
    """

    def __init__(self, next_id: Callable[[list[int]], int], sequence_len: int = 128) -> None:
        self.config = small_config(sequence_len)
        self.device = torch.device("cpu")
        self.compute_dtype = torch.float32
        self.num_read = 0
        self._next_id = next_id

    def __call__(self, ids, cache, lengths=None, last_only=False):
        assert last_only, "the engine never asks for logits of all positions"
        self.num_read += ids.numel() if lengths is None else sum(lengths)
        cache.begin(ids, lengths).commit()
        logits = torch.zeros(len(ids), self.config.vocab_size)
        for row, length in enumerate(cache.positions.tolist()):
            logits[row, self._next_id(cache.ids[row, :length].tolist())] = 20.0
        return logits


def mark(text: str) -> list[int]:
    """Ids of a text in which special tokens are written out: ``mark("<|bos|>hi")``."""
    tokenizer = byte_tokenizer()
    ids: list[int] = []
    while text:
        name = next((name for name in SPECIAL_TOKENS if text.startswith(name)), None)
        ids += [tokenizer.special_ids[name]] if name else list(text[0].encode("utf-8"))
        text = text[len(name) if name else 1 :]
    return ids


def scripted_bundle(answers: dict[str, str], sequence_len: int = 128) -> SmallBundle:
    """A chat model that answers each message of a person as written; the answers may hold special tokens."""
    tokenizer = byte_tokenizer()
    scripts = {message: mark(answer + "<|assistant_end|>") for message, answer in answers.items()}
    user_start, user_end, start = (
        tokenizer.special_ids[f"<|{name}|>"] for name in ("user_start", "user_end", "assistant_start")
    )

    def next_id(history: list[int]) -> int:
        begin = len(history) - history[::-1].index(start)
        message_end = len(history) - 1 - history[::-1].index(user_end)
        message_begin = len(history) - history[::-1].index(user_start)
        script = scripts[tokenizer.decode(history[message_begin:message_end])]
        return script[min(len(history) - begin, len(script) - 1)]

    return SmallBundle(ScriptedNet(next_id, sequence_len), tokenizer)  # type: ignore[arg-type]
