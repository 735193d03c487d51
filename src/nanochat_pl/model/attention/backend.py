"""What an attention backend is, and the facts by which one is chosen.

Shapes: B rows, T positions, H query heads, G key/value heads, D head width, w window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BackendName = Literal["products", "sdpa", "varlen", "flex", "bands"]


class Documents(NamedTuple):
    """Which positions of packed rows are of one document.

    Attributes:
        numbers: int32 (B, T): of each position's document in its row; it never falls.
        ends: int32 (N + 1,): where each document begins among the B · T positions of all rows, then B · T, repeated up
            to a power of two. Only made where the backend ``varlen`` takes it: its size depends on values.
    """

    numbers: Tensor
    ends: Tensor | None = None


class Kernels(NamedTuple):
    """What of a device and of PyTorch the choice depends on."""

    device_type: str
    capability: tuple[int, int] | None = None  # of a GPU of NVIDIA; None: it is none
    varlen: bool = False  # whether PyTorch has flash kernels with windows
    flex: bool = True  # whether it has FlexAttention


class Case(NamedTuple):
    """What is computed.

    Attributes:
        window: positions before its own that a query sees.
        length: T.
        documents: whether rows have several documents that do not see each other.
        compiled: whether it is part of a graph that torch.compile makes.
    """

    dtype: torch.dtype
    window: int
    length: int
    head_dim: int
    documents: bool = False
    compiled: bool = False

    @property
    def is_causal_alone(self) -> bool:
        """Whether a query sees all positions before it."""
        return self.window >= self.length - 1 and not self.documents


Attend = Callable[[Tensor, Tensor, Tensor, int, float, Documents | None], Tensor]


@dataclass(frozen=True)
class Backend:
    """One way to compute attention over whole rows, forward and backward.

    Attributes:
        attend: q (B, H, T, D), k and v (B, G, T, D), window, scale, documents → (B, H, T, D); query head h uses
            key/value head h // (H / G).
        cannot: why it cannot compute a case; None: it can, as far as that is known without trying.
        unwanted: why it is not taken by itself for a case that it can compute; None: nothing speaks against it.
    """

    name: BackendName
    attend: Attend
    cannot: Callable[[Kernels, Case], str | None]
    unwanted: Callable[[Kernels, Case], str | None]

    def why_not(self, kernels: Kernels, case: Case) -> str | None:
        """What speaks against it."""
        return self.cannot(kernels, case) or self.unwanted(kernels, case)


def nothing(kernels: Kernels, case: Case) -> None:
    """Nothing speaks against it."""
