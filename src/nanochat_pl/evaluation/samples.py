"""Greedy continuations of fixed prompts: what a base model says, to be read by a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # with torch, which the settings of the prompts do without
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


def write_samples(
    engine: Engine, prompts: Sequence[str] = DEFAULT_PROMPTS, max_tokens: int = 16
) -> list[dict[str, str]]:
    """Continue each prompt (bos in front) greedily: ``prompt`` and ``text``, without special tokens, of each."""
    tokenizer = engine.tokenizer
    rows = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    results = engine.generate(rows, max_tokens=max_tokens, tools=False)
    return [{"prompt": prompt, "text": result.text} for prompt, result in zip(prompts, results, strict=True)]
