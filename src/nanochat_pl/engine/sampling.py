"""From logits to token ids: greedy, or drawn with temperature and top-k, one source of chance per row.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_pl.common.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most likely token; above, logits are divided by it before the softmax.
        top_k: only the k most likely tokens can be drawn; None, 0 or more than V: all of them.
        seed: with a prompt's place in the list, the seed of that prompt's own generator.
    """

    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature={self.temperature!r}: must be a finite number, 0 (greedy) or above.")
        if self.top_k is not None and self.top_k < 0:
            problems.append(f"top_k={self.top_k!r}: must be 0 (all tokens) or above.")
        if problems:
            raise UserError(problems)

    @property
    def greedy(self) -> bool:
        """Whether no chance is involved."""
        return self.temperature == 0

    def generator(self, index: int) -> random.Random:
        """The generator of the prompt with this index: no two prompts, and no two seeds (1 and -1), share one."""
        return random.Random(f"{self.seed}:{index}")


def choose(logits: Tensor, sampling: Sampling, uniforms: list[float]) -> Tensor:
    """Choose one token per row.

    Args:
        logits: float32 (B, V).
        sampling: greedy, or temperature and top-k.
        uniforms: B numbers in [0, 1), one drawn from each row's own generator; not read where greedy.

    Returns:
        int64 (B,)
    """
    if sampling.greedy:
        return logits.argmax(dim=-1)
    device, candidates = logits.device, None
    if device.type == "mps":  # It has no double precision.
        logits = logits.cpu()
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        logits, candidates = logits.topk(sampling.top_k, dim=-1)
    # The maximum is taken off first, so that a tiny temperature gives 1 and 0 and no infinities. Double precision,
    # because a sum over a large vocabulary in float32 would swallow rare tokens.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).double() / sampling.temperature
    cumulative = scaled.exp().cumsum(dim=-1)
    # Rounded up to the whole sum it would point behind the last token.
    uniform = torch.tensor(uniforms, dtype=torch.float64, device=logits.device).clamp(max=1 - 1e-12)
    places = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return (places if candidates is None else candidates.gather(-1, places)).squeeze(-1).to(device)


def log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities float32 (B,) of ``ids`` (B,) under the plain softmax of ``logits`` (B, V).

    That is temperature 1 and no top-k, however the ids were chosen: a policy gradient needs the model's own
    probability, not that of the way it was sampled.
    """
    return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)
