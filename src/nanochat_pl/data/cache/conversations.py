"""Conversations as token ids and masks on disk: rendered once, read by memory map."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from nanochat_pl.common.errors import UserError
from nanochat_pl.common.launch_env import usable_cpus
from nanochat_pl.data.cache.content_cache import fingerprint_of, read_cache
from nanochat_pl.data.cache.tokens import FORMAT, CachedShard, Encoded, TokenCache, token_dtype, write_shard
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.tokenizer.chat_format import problems_of_conversation

_RULE = 2  # part of every fingerprint: how conversations are cut and which are left out
LossMask = Literal["assistant", "all"]
_BATCH = 4_096  # conversations at a time: enough for all threads, little enough for the memory


class Conversations(Protocol):
    """Conversations by number: plain dicts with ``messages``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclass
class Rendering:
    """What became of conversations when they were rendered.

    Attributes:
        num_cut: conversations cut at ``max_tokens``, those that are left out too.
        num_cut_tokens: tokens that the cuts dropped.
        num_without_target: conversations left out because (after the cut) no token of theirs is trained on.
        num_targets: tokens that are trained on, bos left out.
        num_marked: of those without, conversations with an answer that is marked not to be learnt, where every token of
            a conversation is learnt.
    """

    num_cut: int = 0
    num_cut_tokens: int = 0
    num_without_target: int = 0
    num_targets: int = 0
    num_marked: int = 0


class ConversationCache(TokenCache):
    """Rendered conversations as tokens, with masks where not all of them are trained on.

    A conversation that is left out has length 0, so that each keeps its number.
    """

    def __init__(self, shard: CachedShard, fingerprint: str, rendering: Rendering) -> None:
        super().__init__([shard], fingerprint)
        self.rendering = rendering


def build_conversation_cache(
    conversations: Conversations,
    tokenizer: Tokenizer,
    max_tokens: int,
    cache_dir: Path,
    key: str,
    progress: Callable[[int, int], None] | None = None,
    loss_mask: LossMask = "assistant",
    name: str = "",
) -> ConversationCache:
    """Render conversations once, or find them rendered.

    Args:
        max_tokens: longer ones are cut there, bos included, and counted. T+1 at most, for rows of T.
        key: says which conversations these are; another text needs another key.
        loss_mask: tokens that the loss is taken of: what the assistant writes, or all as of a document, bos too.
        name: what the conversations are called in messages; "": by their key.

    Raises:
        UserError: no conversation has a token to train on; or what the tokenizer says of a malformed one.
    """
    full_key = {
        "format": [FORMAT, _RULE],
        "tokenizer": tokenizer.fingerprint,
        "conversations": key,
        "count": len(conversations),
        "max_tokens": max_tokens,
    }
    masked = loss_mask == "assistant"
    if not masked:
        full_key["trained"] = loss_mask
    folder = cache_dir / "conversations" / fingerprint_of(full_key)[:32]
    dtype = token_dtype(tokenizer.vocab_size)
    facts = read_cache(folder, full_key)
    if facts is None:
        facts = asdict(Rendering())
        report = progress or (lambda done, total: None)
        rendered = _rendered(conversations, tokenizer, max_tokens, key, facts, report, masked)
        write_shard(folder, full_key, rendered, dtype, facts, masked)
    shard = CachedShard(key, folder, dtype, masked)
    if not shard.num_tokens:
        raise _nothing_to_learn(name or key, len(conversations), max_tokens, Rendering(**facts))
    return ConversationCache(shard, fingerprint_of(full_key), Rendering(**facts))


def _nothing_to_learn(name: str, number: int, max_tokens: int, rendering: Rendering) -> UserError:
    problem = f"{name}: none of {number:,} conversations has a token to train on"
    if rendering.num_cut == number:
        return UserError(
            f"{problem}: every prompt is longer than a row of {max_tokens - 1:,} tokens, and what is behind it is cut.",
            "Shorten the prompts, or give the base stage a longer model.sequence_len.",
        )
    cut = f"; {rendering.num_cut:,} are cut to a row of {max_tokens - 1:,} tokens" if rendering.num_cut else ""
    return UserError(f"{problem}{cut}.", "Look at the answers: they are empty or marked not to be learnt.")


def is_marked(conversation: Mapping[str, Any]) -> bool:
    """Whether an answer of a conversation is marked not to be learnt."""
    return any(message.get("weight") == 0 for message in conversation["messages"])


def _rendered(
    conversations: Conversations,
    tokenizer: Tokenizer,
    max_tokens: int,
    key: str,
    facts: dict[str, int],
    progress: Callable[[int, int], None],
    masked: bool,
) -> Encoded:
    total, num_threads = len(conversations), usable_cpus()
    for first in range(0, total, _BATCH):
        batch = [conversations[i] for i in range(first, min(first + _BATCH, total))]
        for number, conversation in enumerate(batch, first):
            if problems := problems_of_conversation(conversation):
                raise UserError([f"{key}: conversation {number}: {problem}" for problem in problems])
        rendered = tokenizer.render_conversations(batch, sys.maxsize, num_threads)
        for place, (all_ids, all_mask) in enumerate(rendered):
            ids, mask = all_ids[1:max_tokens], all_mask[1:max_tokens]  # without bos
            num_targets = sum(mask) if masked else len(ids)
            if not masked and is_marked(batch[place]):
                num_targets, facts["num_marked"] = 0, facts["num_marked"] + 1
            facts["num_cut"] += len(all_ids) > max_tokens
            facts["num_cut_tokens"] += max(0, len(all_ids) - max_tokens)
            facts["num_without_target"] += num_targets == 0
            facts["num_targets"] += num_targets
            yield (ids if num_targets else []), (mask if num_targets else []) if masked else None
        progress(first + len(batch), total)
