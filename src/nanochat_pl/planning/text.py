"""What of a text a plan takes: shards, epochs, what its tokens take on a disk."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from nanochat_pl.common.text_amounts import CROPPED_SHARE, epochs_of, shards_for, token_cache_bytes, tokens_taken
from nanochat_pl.planning.plan import Plan


@dataclass(frozen=True)
class TextFacts:
    """What is known of the text that is trained on; null where it is not.

    Attributes:
        bytes_per_token: assumed of the tokenizer.
        shard_bytes: of text in one shard.
        num_shards: training shards that there are.
        tokens_at_hand: about how many tokens lie on this machine.
        crops: whether the packer drops the rest of documents that do not fit.
        streamed: whether it is tokenized while the training runs, as far as it is read, and not all of it before.
        fetched: whether what is missing of it is fetched; then ``tokens_at_hand`` are those of all shards.
    """

    name: str
    bytes_per_token: float
    shard_bytes: float | None = None
    num_shards: int | None = None
    tokens_at_hand: int | None = None
    crops: bool = False
    streamed: bool = False
    fetched: bool = False


def add_text(plan: Plan, text: TextFacts) -> None:
    """Add the section on data: the text that the horizon takes, shards, and epochs over what is at hand."""
    plan.section = "Data"
    tokens, kept = plan["total_tokens"], 1 - CROPPED_SHARE if text.crops else 1.0
    dropped = f" / {kept:g}, as data.long_documents=crop drops the rest" if text.crops else ""
    formula = f"total_tokens * {text.bytes_per_token:g} bytes a token{dropped}"
    taken = tokens_taken(tokens, text.crops)
    plan.derive("text_bytes", taken * text.bytes_per_token, formula, ("total_tokens",))
    if text.shard_bytes is not None:
        files = itertools.repeat(text.shard_bytes / text.bytes_per_token, text.num_shards or 0)
        formula = f"text_bytes / {text.shard_bytes / 1e6:,.4g} million, rounded up; {text.name} has {text.num_shards:,}"
        plan.derive("shards_needed", shards_for(tokens, text.crops, files), formula, ("text_bytes",))
    how = "about, on this machine" if text.tokens_at_hand is not None else "not known before it has been read once"
    how = "about, with what is fetched while the training runs" if text.fetched else how
    if "tokens_at_hand" not in plan:  # where it bounds the batch it stands there
        plan.derive("tokens_at_hand", text.tokens_at_hand, f"{text.name}: {how}")
    epochs = None if text.tokens_at_hand is None else epochs_of(tokens, text.tokens_at_hand, text.crops)
    formula = f"total_tokens{dropped.partition(',')[0]} / tokens_at_hand"
    plan.derive("epochs", epochs, formula, ("total_tokens", "tokens_at_hand"))
    tokenized = taken if text.tokens_at_hand is None else text.tokens_at_hand
    if text.streamed:
        tokenized = min(taken, tokenized)
    size = token_cache_bytes(tokenized, plan["vocab_size"], plan["sequence_len"])
    what = "those that are read" if text.streamed or text.tokens_at_hand is None else "all at hand"
    plan.derive("token_cache_bytes", size, f"in paths.cache: {what}, as ids, and the index of their rows")
