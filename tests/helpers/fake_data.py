"""Small stand-ins for a tokenizer and a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nanochat_pl.data.sources.base import Shard, Split

BOS = 0


class ByteTokenizer:
    """Byte b has the id b + 1; id 0 is bos. Counts the texts that it is given, and fails at a chosen one."""

    vocab_size = 257
    bos_id = BOS

    def __init__(self, fingerprint: str = "bytes", fail_at: str | None = None) -> None:
        self.fingerprint = fingerprint
        self.fail_at = fail_at
        self.num_texts = 0

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        self.num_texts += len(texts)
        if self.fail_at in texts:
            raise KeyboardInterrupt
        return [[byte + 1 for byte in text.encode("utf-8")] for text in texts]

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode_batch([text])[0], dtype=np.uint32)

    def render_conversations(
        self, conversations: list[dict[str, Any]], max_tokens: int, num_threads: int = 1
    ) -> list[tuple[list[int], list[int]]]:
        """Answers are trained on, questions are not."""
        results = []
        for conversation in conversations:
            ids, mask = [BOS], [0]
            for message in conversation["messages"]:
                text = message["content"].encode("utf-8")
                ids += [byte + 1 for byte in text]
                mask += [int(message["role"] == "assistant")] * len(text)
            results.append((ids[:max_tokens], mask[:max_tokens]))
        return results


class ListSource:
    """Shards of given texts, in the train split."""

    name = "list"
    fingerprint = "list"

    def __init__(self, shards: dict[str, list[str]]) -> None:
        self._shards = shards

    def shards(self, split: Split) -> list[Shard]:
        return [
            Shard(name, split, repr(texts), repr(texts), lambda texts=texts: iter(texts))
            for name, texts in self._shards.items()
            if split == "train"
        ]


def cache_files(cache_dir: Path, name: str) -> list[Path]:
    """All files of a name in a cache."""
    return sorted(cache_dir.rglob(name))
