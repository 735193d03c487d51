"""Tokens with their log-probabilities and what could have stood in their place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanochat_pl.common.errors import UserError
from nanochat_pl.engine import Result
from nanochat_pl.model.gpt import GPT
from nanochat_pl.tokenizer import Tokenizer


@dataclass(frozen=True)
class ScoredToken:
    """A token of a text or an answer.

    Attributes:
        token_id, text: which it is; the text as :func:`show_token` gives it.
        logprob: natural logarithm of its probability under the model, given all tokens before it.
        forced: whether a tool put it in.
        alternatives: the most likely tokens at its place with their log-probabilities, itself maybe among them.
    """

    token_id: int
    text: str
    logprob: float
    forced: bool
    alternatives: list[tuple[str, float]]


def show_token(tokenizer: Tokenizer, token_id: int) -> str:
    """A token on one line: line ends and tabs as ⏎ and ⇥, bytes that are no character by themselves as ``\\xe2``."""
    try:
        text = tokenizer.decode_bytes([token_id]).decode("utf-8")
    except UnicodeDecodeError as error:
        return re.sub(r"[\udc80-\udcff]", lambda half: f"\\x{ord(half[0]) - 0xDC00:02x}", _escaped(error.object))
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(sign if sign.isprintable() else f"\\x{ord(sign):02x}" for sign in text)


def _escaped(token: bytes) -> str:
    return token.decode("utf-8", "surrogateescape")


def scored_result(tokenizer: Tokenizer, result: Result) -> list[ScoredToken]:
    """The tokens of an answer of :meth:`Engine.generate`. Alternatives are there if it had ``top_logprobs``."""
    tops = result.top_logprobs or [[] for _ in result.ids]
    rows = zip(result.ids, result.logprobs, result.forced, tops, strict=True)
    return [
        ScoredToken(token_id, show_token(tokenizer, token_id), logprob, forced, _named(tokenizer, top))
        for token_id, logprob, forced, top in rows
    ]


@torch.inference_mode()
def score_tokens(net: GPT, tokenizer: Tokenizer, ids: Sequence[int], top: int = 5) -> list[ScoredToken]:
    """How likely each token of a given text was, in one forward.

    Args:
        ids: at least two; the first, bos as a rule, has nothing before it and is left out of the result.
        top: number of alternatives of each.

    Raises:
        UserError: there are fewer than two tokens.
    """
    if len(ids) < 2:
        raise UserError(f"{len(ids)} tokens: the first has no probability, so there must be two.")
    logits = net(torch.tensor([list(ids[:-1])], device=net.device))[0]
    logprobs = logits.log_softmax(dim=-1).cpu()
    best = logprobs.topk(top, dim=-1)
    scored = []
    for place, token_id in enumerate(ids[1:]):
        pairs = zip(best.indices[place].tolist(), best.values[place].tolist(), strict=True)
        text, logprob = show_token(tokenizer, token_id), float(logprobs[place, token_id])
        scored.append(ScoredToken(token_id, text, logprob, False, _named(tokenizer, list(pairs))))
    return scored


def _named(tokenizer: Tokenizer, top: Sequence[tuple[int, float]]) -> list[tuple[str, float]]:
    return [(show_token(tokenizer, token_id), logprob) for token_id, logprob in top]
