"""Choosing among letters: the answer is the letter whose logit is the highest where the assistant's answer begins.

Shapes: B rows of one forward, T positions, C model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nanochat_pl.common.errors import NotFiniteError, UserError
from nanochat_pl.evaluation.scoring import batches_by_length
from nanochat_pl.model.gpt import GPT
from nanochat_pl.model.loss import softcap
from nanochat_pl.tokenizer import Tokenizer

MAX_POSITIONS = 16_384  # of one forward, padding included: bounds the memory of activations


def letter_ids(tokenizer: Tokenizer, letters: Sequence[str], name: str) -> list[int]:
    """The token of each letter, no blank before it.

    Raises:
        UserError: of task ``name`` a letter is not one token.
    """
    ids = [tokenizer.encode(letter) for letter in letters]
    if split := [letter for letter, pieces in zip(letters, ids, strict=True) if len(pieces) != 1]:
        raise UserError(
            f"{name}: the tokenizer has no single token for {', '.join(map(repr, split))}, so these answers cannot be "
            "chosen by their logits.",
            fix="Take the task out of the evaluation's tasks, or let its answers be letters such as A, B, C.",
        )
    assert len(set(letters)) == len(letters) > 0, f"{name}: letters {letters}"
    return [pieces[0] for pieces in ids]


@torch.inference_mode()
def letter_probabilities(
    net: GPT,
    prompts: Sequence[Sequence[int]],
    letters: Sequence[Sequence[int]],
    max_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    name: str = "",
) -> list[list[float]]:
    """How likely each of a prompt's letters comes next, among them alone.

    Args:
        prompts: token ids, at least one each, of any lengths.
        letters: of each prompt the ids to choose from.
        max_rows: most prompts of one forward: memory and time, not results.
        progress: called with (prompts that were read, all prompts).
        name: what they belong to, for messages.

    Returns:
        for each prompt as many probabilities as it has letters; they sum to one.

    Raises:
        UserError: the model's outputs are not finite numbers.
    """
    results: list[list[float]] = [[] for _ in prompts]
    num_read = 0
    for batch in batches_by_length([len(prompt) for prompt in prompts], MAX_POSITIONS):
        size = max_rows or len(batch)
        for part in (batch[start : start + size] for start in range(0, len(batch), size)):
            last = _last_hidden(net, [prompts[i] for i in part])
            for i, x in zip(part, last, strict=True):
                # In float32, and of these letters only: in a shorter type two of them are often equal.
                weight = net.head_weight[torch.tensor(letters[i], device=x.device)]
                logits = softcap(weight.float() @ x.float(), net.config.softcap)
                results[i] = logits.softmax(dim=0).tolist()
                if not all(map(math.isfinite, results[i])):
                    raise NotFiniteError(name)
            num_read += len(part)
            if progress is not None:
                progress(num_read, len(prompts))
    return results


def _last_hidden(net: GPT, rows: Sequence[Sequence[int]]) -> Tensor:
    """What the head reads at each row's last token: (B, C). Padding comes behind, where nothing looks at it."""
    lengths = torch.tensor([len(row) for row in rows], device=net.device)
    longest = int(lengths.max())
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=net.device)
    return net.hidden(ids)[torch.arange(len(rows), device=net.device), lengths - 1]
