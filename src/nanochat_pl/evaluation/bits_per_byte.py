"""Bits per byte: a loss that does not depend on the tokenizer, with its standard error.

Nats of the targets divided by ln 2 and by the UTF-8 bytes that the targets stand for. Targets without bytes (special
tokens, ignored positions) count on neither side. Checked against ``golden/bpb.json``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from nanochat_pl.distributed import collectives


class BitsPerByteResult(NamedTuple):
    """What :class:`BitsPerByte` found.

    Attributes:
        bpb: bits per byte; None where no target had bytes.
        stderr: its standard error over rows; None where fewer than two rows had bytes.
        num_bytes: bytes of all targets.
        num_rows: rows with at least one byte.
    """

    bpb: float | None
    stderr: float | None
    num_bytes: int
    num_rows: int


class BitsPerByte(Metric):
    """Bits per byte over all rows, batches and processes.

    The standard error treats rows as independent draws and bits per byte as a ratio of two sums over them:
    ``sqrt(n / (n - 1) * sum_r (nats_r - ratio * bytes_r)²) / sum_r bytes_r``. Only sums are kept, so processes add up.

    Args:
        token_bytes: int (V,): raw bytes of each token, 0 for special ones; None where each update is given the bytes.
    """

    full_state_update = False
    token_bytes: Tensor | None
    sums: Tensor

    def __init__(self, token_bytes: np.ndarray | Tensor | None = None) -> None:
        super().__init__()
        known = None if token_bytes is None else torch.tensor(np.asarray(token_bytes), dtype=torch.int64)
        self.register_buffer("token_bytes", known, persistent=False)
        # Over rows: nats, bytes, nats², nats * bytes, bytes², 1. In float64: the squares nearly cancel. Then nats and
        # number of all targets, also of those without bytes.
        self.add_state("sums", torch.zeros(8, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, targets: Tensor, num_bytes: Tensor | None = None) -> None:
        """Add rows.

        Args:
            losses: nats per token, float32 (B, T).
            targets: int64 (B, T), negative where ignored.
            num_bytes: int (B, T), of the targets; None: as ``token_bytes`` says.
        """
        if num_bytes is None:
            assert self.token_bytes is not None, "neither the metric nor the update knows the bytes of the targets"
            num_bytes = bytes_of_targets(targets.cpu(), self.token_bytes.cpu())
        totals = torch.tensor([losses.sum().item(), int((targets >= 0).sum())], dtype=torch.float64)
        sums = torch.cat([sums_over_rows(losses, num_bytes), totals])
        self.sums = self.sums + sums.to(self.sums.device)

    def compute(self) -> BitsPerByteResult:
        """The metric over all that was added; None instead of a division by zero."""
        return result_of(self.sums[:6].tolist())

    def of_all_processes(self) -> tuple[Tensor, float]:
        """The sums that :func:`result_of` takes, and the nats per target, over all processes. All of them call it."""
        sums = self.sums.cpu().clone()
        collectives.all_reduce_(sums)
        return sums[:6], (sums[6] / sums[7].clamp(min=1)).item()


def bytes_of_targets(targets: Tensor, token_bytes: Tensor) -> Tensor:
    """Bytes of each target, of the shape of ``targets``: 0 for special tokens and for negative (ignored) targets."""
    return torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)


def sums_over_rows(losses: Tensor, num_bytes: Tensor) -> Tensor:
    """What :func:`result_of` takes, of nats per token float32 (B, T) and the bytes of the targets, int (B, T).

    On the host: not every device has float64, and the sums need it.
    """
    losses, num_bytes = losses.cpu(), num_bytes.cpu()
    # Not a product: the loss of an ignored target may be anything, and 0 × inf is NaN.
    nats = torch.where(num_bytes > 0, losses.double(), 0.0).sum(dim=1)
    size = num_bytes.sum(dim=1).double()
    counted = (size > 0).double()
    return torch.stack([nats, size, nats * nats, nats * size, size * size, counted]).sum(dim=1)


def weighted_result(sums: Sequence[Tensor], shares: Sequence[float]) -> BitsPerByteResult:
    """The metric over several sets of rows, as if each had its share of the rows, however many were measured.

    Args:
        sums: of each set, as :meth:`BitsPerByte.of_all_processes` gives them; one without any bytes is passed over.
        shares: of each set; they sum to one.
    """
    num_rows = sum(float(each[-1]) for each in sums)
    total = torch.zeros(6, dtype=torch.float64)
    for each, share in zip(sums, shares, strict=True):
        factor = share * num_rows / max(float(each[-1]), 1.0)  # one row stands for so many
        powers = torch.tensor([1, 1, 2, 2, 2, 0], dtype=torch.float64)
        total += each.cpu() * factor**powers
    return result_of(total.tolist())


def result_of(sums: Sequence[float]) -> BitsPerByteResult:
    """The metric of the sums over rows, see :class:`BitsPerByte`."""
    nats, size, nats_nats, nats_size, size_size, rows = sums
    if size == 0:
        return BitsPerByteResult(None, None, 0, 0)
    ratio = nats / size
    stderr = None
    if rows >= 2:
        squares = max(0.0, nats_nats - 2 * ratio * nats_size + ratio**2 * size_size)
        stderr = math.sqrt(squares * rows / (rows - 1)) / size / math.log(2)
    return BitsPerByteResult(ratio / math.log(2), stderr, int(size), int(rows))
