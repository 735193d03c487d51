"""Validation: bits per byte and loss on fixed rows, which do not depend on machine, batch size or training settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from nanochat_pl.common.out_of_memory import ChunkOnOOM
from nanochat_pl.data.batch import ValidationBatch
from nanochat_pl.data.cache.tokens import TokenCache
from nanochat_pl.data.packing.rows import Rows, validation_rows
from nanochat_pl.data.sources.base import Source
from nanochat_pl.data.sources.mixture import MixedSource
from nanochat_pl.distributed import collectives
from nanochat_pl.distributed.partition import share
from nanochat_pl.evaluation.bits_per_byte import BitsPerByte, bytes_of_targets, result_of, weighted_result
from nanochat_pl.model.gpt import GPT
from nanochat_pl.tokenizer import Tokenizer


def name_by_source(column: str, source: str) -> str:
    """The name of a source's metric, ``train/loss_wiki``."""
    return f"{column}_{source}"


def validation_metrics(sums: Mapping[str, BitsPerByte], shares: Sequence[float]) -> dict[str, float]:
    """``val/bpb``, ``val/bpb_stderr`` and ``val/loss`` over all processes; of named sources also ``val/bpb_NAME``.

    Args:
        sums: of each source, by name; that of one which is no mixture is empty.
        shares: of the sources in the training, by which they are weighted; they sum to one.
    """
    measured = {name: each.of_all_processes() for name, each in sums.items()}
    loss = sum(share * loss for share, (_, loss) in zip(shares, measured.values(), strict=True))
    result = weighted_result([sums for sums, _ in measured.values()], shares)
    metrics = {"val/bpb": result.bpb, "val/bpb_stderr": result.stderr, "val/loss": loss}
    for name, (of_source, _) in measured.items():
        if name:
            metrics[name_by_source("val/bpb", name)] = result_of(of_source.tolist()).bpb
    return {name: value for name, value in metrics.items() if value is not None}


class ValidationRows(Dataset[ValidationBatch]):
    """Fixed rows of one source; item k is this process's share of the k-th batch, which may be empty.

    Args:
        rows: at least ``num_rows``.
        num_rows: the first ones are taken.
        batch_size: rows of a process at once.
        token_bytes: int (V,): raw bytes of each token, 0 for special ones.
    """

    def __init__(self, rows: Rows, num_rows: int, batch_size: int, token_bytes: np.ndarray) -> None:
        self.rows, self.num_rows, self.batch_size = rows, num_rows, batch_size
        self._token_bytes = torch.tensor(np.asarray(token_bytes), dtype=torch.int64)

    def __len__(self) -> int:
        largest = share(0, self.num_rows, 0, collectives.world_size())
        return -(-len(largest) // self.batch_size)

    def __getitem__(self, number: int) -> ValidationBatch:
        own = share(0, self.num_rows, collectives.rank(), collectives.world_size())
        numbers = own[number * self.batch_size : (number + 1) * self.batch_size]
        inputs, targets = (torch.as_tensor(part) for part in self.rows.read(np.array(numbers, dtype=np.int64)))
        return ValidationBatch(inputs, targets, bytes_of_targets(targets.long(), self._token_bytes))


@dataclass(frozen=True)
class Validation:
    """Fixed rows of one or several sources: the same rows for any batch size, machine and setting of the training.

    Attributes:
        sources: by name; the name of one alone is empty. There are as many rows of each as its share of them; fewer
            where its held-out text ends before, and then each counts for more; one at least.
        shares: of the sources in the training, by which they are weighted.
        tokenizer: what made the ids.
    """

    sources: Mapping[str, ValidationRows]
    shares: Sequence[float]
    tokenizer: Tokenizer
    in_pieces: ChunkOnOOM = field(default_factory=lambda: ChunkOnOOM("validation"), repr=False, compare=False)

    @classmethod
    def of_rows(cls, rows: Rows, num_rows: int, tokenizer: Tokenizer, batch_size: int) -> Validation:
        return cls({"": ValidationRows(rows, num_rows, batch_size, tokenizer.token_bytes)}, (1.0,), tokenizer)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sources)

    @property
    def num_rows(self) -> int:
        return sum(source.num_rows for source in self.sources.values())

    @property
    def num_tokens(self) -> int:
        """Tokens of the held-out text of all sources, of which the rows are the beginning."""
        return sum(source.rows.cache.num_tokens for source in self.sources.values())

    @torch.no_grad()
    def measure(self, net: GPT, between: Callable[[], None] = lambda: None) -> dict[str, float]:
        """The metrics of :func:`validation_metrics`. Each process has a share of the rows.

        Args:
            net: the model; runs eagerly (its training graph is not compiled again), in eval mode.
            between: called between batches, on all processes equally often.
        """
        device = next(net.parameters()).device
        sums = {name: BitsPerByte() for name in self.sources}
        net.eval()
        for name, rows in self.sources.items():
            for number in range(len(rows)):
                between()
                inputs, targets, num_bytes = rows[number]
                if len(inputs):
                    inputs, targets = inputs.to(device), targets.to(device)
                    sums[name].update(self.in_pieces(net.losses, inputs, targets), targets, num_bytes)
        net.train()
        return validation_metrics(sums, self.shares)


def open_validation(
    source: Source,
    tokenize: Callable[[Source, int], TokenCache],
    tokenizer: Tokenizer,
    cache: Path,
    *,
    sequence_len: int,
    num_rows: int,
    device_batch_size: int,
) -> Validation:
    """The rows to validate on, of the source's held-out text.

    Args:
        source: one or a mixture.
        tokenize: gives the tokens of the held-out text of one: of very much of it the first shards that hold so many.
        sequence_len: T.
        num_rows: at most; fewer where the text ends before.
        device_batch_size: rows in memory at once.
    """

    def of(part: Source, count: int) -> ValidationRows:
        tokens = tokenize(part, count * (sequence_len + 1))
        rows = validation_rows(tokens, sequence_len, tokenizer.bos_id, cache, count)
        return ValidationRows(rows, len(rows), device_batch_size, tokenizer.token_bytes)

    if not isinstance(source, MixedSource):
        return Validation({"": of(source, num_rows)}, (1.0,), tokenizer)
    counts = zip(source.parts.items(), source.turns.counts(num_rows), strict=True)
    parts = {name: of(part, max(count, 1)) for (name, part), count in counts}
    return Validation(parts, source.turns.shares, tokenizer)
