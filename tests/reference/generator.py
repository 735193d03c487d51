"""Greedy generation in the plainest way: one prompt at a time, no cache, everything computed again for each token."""

from __future__ import annotations

from collections.abc import Callable

import torch


def generate_greedily(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    prompt: list[int],
    max_tokens: int,
    stop_ids: set[int],
    special_ids: dict[str, int] | None = None,
    calculate: Callable[[list[int]], list[int] | None] | None = None,
) -> tuple[list[int], list[float]]:
    """Continue one prompt.

    Args:
        logits_of: int64 ids (1, T) → logits (1, T, V): a model without a cache.
        prompt: ids of the prompt.
        max_tokens: most new tokens.
        stop_ids: the answer ends after one of these.
        special_ids, calculate: for tool use: the markers, and expression ids → result ids or None.

    Returns:
        the new ids and their log-probabilities.
    """
    ids = list(prompt)
    logprobs = []
    forced: list[int] = []
    expression = None
    for _ in range(max_tokens):
        with torch.no_grad():
            logits = logits_of(torch.tensor([ids]))[0, -1].double()
        chosen_by_model = not forced
        token = int(logits.argmax()) if chosen_by_model else forced.pop(0)
        ids.append(token)
        logprobs.append(float(torch.log_softmax(logits, dim=0)[token]))
        if not chosen_by_model:
            continue
        if token in stop_ids:
            break
        if calculate is None or special_ids is None:
            continue
        if token == special_ids["<|python_start|>"]:
            expression = []
        elif token == special_ids["<|python_end|>"] and expression is not None:
            result = calculate(expression)
            if result is not None:
                forced = [special_ids["<|output_start|>"], *result, special_ids["<|output_end|>"]]
            expression = None
        elif expression is not None:
            expression.append(token)
    return ids[len(prompt) :], logprobs
