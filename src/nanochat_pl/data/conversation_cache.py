"""Conversations as token ids and masks on disk: rendered once, read by memory map."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from nanochat_pl.common.errors import UserError
from nanochat_pl.data.cache_folder import fingerprint_of, read_cache
from nanochat_pl.data.token_cache import (
    BATCH_DOCUMENTS,
    FORMAT,
    CachedShard,
    Encoded,
    Progress,
    TokenCache,
    token_dtype,
    write_shard,
)
from nanochat_pl.tokenizer import Tokenizer
from nanochat_pl.tokenizer.chat_format import problems_of_conversation


class Conversations(Protocol):
    """Conversations by number: plain dicts with ``messages``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class ConversationCache(TokenCache):
    """Rendered conversations as tokens and masks.

    A conversation that is left out has length 0, so that each keeps its number.

    Attributes:
        num_cut: conversations cut at ``max_tokens``.
        num_without_target: conversations left out because (after the cut) no token of theirs is trained on.
    """

    def __init__(self, shard: CachedShard, fingerprint: str, num_cut: int, num_without_target: int) -> None:
        super().__init__([shard], fingerprint)
        self.num_cut = num_cut
        self.num_without_target = num_without_target


def build_conversation_cache(
    conversations: Conversations,
    tokenizer: Tokenizer,
    max_tokens: int,
    cache_dir: Path,
    key: str,
    progress: Progress | None = None,
) -> ConversationCache:
    """Render conversations once, or find them rendered.

    Args:
        conversations: plain dicts with ``messages``.
        max_tokens: longer ones are cut there, bos included, and counted. T+1 at most, for rows of T.
        key: says which conversations these are; another text needs another key.
        cache_dir, progress: as for :func:`build_token_cache`, all conversations being one shard.

    Raises:
        UserError: no conversation has a token to train on; or what the tokenizer says of a malformed one.
    """
    full_key = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "conversations": key,
        "count": len(conversations),
        "max_tokens": max_tokens,
    }
    folder = cache_dir / "conversations" / fingerprint_of(full_key)[:32]
    dtype = token_dtype(tokenizer.vocab_size)
    facts = read_cache(folder, full_key)
    if facts is None:
        facts = {"num_cut": 0, "num_without_target": 0}
        rendered = _rendered(conversations, tokenizer, max_tokens, key, facts)

        def report(num_tokens: int) -> None:
            if progress is not None:
                progress(0, 1, num_tokens)

        write_shard(folder, full_key, rendered, dtype, facts, report, masked=True)
    shard = CachedShard(key, folder, dtype, masked=True)
    if progress is not None:
        progress(1, 1, len(shard.tokens))
    if not len(shard.tokens):
        raise UserError(f"{key}: none of {len(conversations):,} conversations has a token to train on.")
    return ConversationCache(shard, fingerprint_of(full_key), facts["num_cut"], facts["num_without_target"])


def _rendered(
    conversations: Conversations, tokenizer: Tokenizer, max_tokens: int, key: str, facts: dict[str, int]
) -> Encoded:
    for first in range(0, len(conversations), BATCH_DOCUMENTS):
        batch = [conversations[i] for i in range(first, min(first + BATCH_DOCUMENTS, len(conversations)))]
        for number, conversation in enumerate(batch, first):
            if problems := problems_of_conversation(conversation):
                raise UserError([f"{key}: conversation {number}: {problem}" for problem in problems])
        # One token more than fits shows which are cut.
        for ids, mask in tokenizer.render_conversations(batch, max_tokens=max_tokens + 1):
            facts["num_cut"] += len(ids) > max_tokens
            ids, mask = ids[1:max_tokens], mask[1:max_tokens]  # without bos
            facts["num_without_target"] += not any(mask)
            yield (ids, mask) if any(mask) else ([], [])
