"""Greedy continuations of fixed prompts: what a base model says, to be read by a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_pl.engine import Engine

# The recipe's seven prompts.
DEFAULT_PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


@dataclass(frozen=True)
class Sample:
    """A prompt and its greedy continuation, as text without special tokens."""

    prompt: str
    text: str


def write_samples(engine: Engine, prompts: Sequence[str] = DEFAULT_PROMPTS, max_tokens: int = 16) -> list[Sample]:
    """Continue each prompt (bos in front) greedily."""
    tokenizer = engine.tokenizer
    rows = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    results = engine.generate(rows, max_tokens=max_tokens, tools=False)
    return [Sample(prompt, result.text) for prompt, result in zip(prompts, results, strict=True)]
