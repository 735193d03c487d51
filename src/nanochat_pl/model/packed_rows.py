"""Rows of several documents, none of which sees another: what a forward over a whole row needs to know of them.

A document begins at the token that every packing mode puts in front of one (bos). A row that begins in the middle of a
document begins with the rest of it. Padding is made of the same token; a run of it is one document.

Shapes: B rows, T positions, C model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_pl.model.attention import Documents, choose_in_graph, windowed_attention
from nanochat_pl.model.attention.varlen import document_ends
from nanochat_pl.model.config import AttentionBackend, GPTConfig


class PackedRows:
    """One forward over whole rows whose documents are kept apart. All shapes follow from those of the ids.

    Args:
        ids: int64 (B, T).
        config: with a ``document_start_id``.
        dtype: of the activations.
        wanted: the attention backend for what it can compute.

    Attributes:
        documents: which positions are of one.
        positions: of each token: int64 (B, T), or a slice where all rows have 0 … T - 1.
    """

    def __init__(
        self, ids: Tensor, config: GPTConfig, dtype: torch.dtype = torch.float32, wanted: AttentionBackend = "auto"
    ) -> None:
        assert config.document_start_id is not None
        marks = ids.eq(config.document_start_id)
        self._starts = marks & ~F.pad(marks, (1, -1))
        self._wanted: AttentionBackend = wanted
        numbers = self._starts.cumsum(dim=1, dtype=torch.int32)
        backends = {
            choose_in_graph(ids.device, wanted, dtype, window, ids.size(1), config.head_dim, True)
            for window in config.windows
        }
        self.documents = Documents(numbers, document_ends(numbers) if "varlen" in backends else None)
        self.positions: Tensor | slice = slice(ids.size(1))
        if config.restart_positions:
            place = torch.arange(ids.size(1), device=ids.device).expand_as(ids)
            first = torch.where(self._starts, place, 0).cummax(dim=1).values
            self.positions = place - first

    def previous(self, x: Tensor) -> Tensor:
        """What comes before each position of x in its document, both (B, T, C); zeros at its start."""
        return F.pad(x, (0, 0, 1, -1)).masked_fill(self._starts[..., None], 0.0)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        """Attention within the documents; ``layer`` is not of interest. Shapes as of :func:`windowed_attention`."""
        return windowed_attention(q, k, v, window, scale, self.documents, self._wanted)
