"""Causal attention with windows: of whole rows, and of new tokens over a cache. No T × T mask is ever made.

Shapes: B rows, T positions, H query heads, G key/value heads, D head width, w window.

Backends, in a fixed order of preference; :func:`why_not` says of each what speaks against it:

- ``products``: plain matrix products, of blocks of queries against the band of keys that they can see. On a CPU and up
  to ``PRODUCTS_REACH`` positions (there they take half the time of the fused kernel, whose tiles are made for long
  rows).
- ``sdpa``: PyTorch's ``scaled_dot_product_attention`` in one call, where the window is the whole row.
- ``varlen``: PyTorch's flash kernels, which know windows. On GPUs, in 16 bits.
- ``bands``: ``scaled_dot_product_attention`` block by block, with masks. Everywhere.

Over a cache a CPU takes ``products`` at any length, other devices ``sdpa``. With ``products`` a token has the same bits
however its text is cut and whatever stands beside it, if matrix products have that quality (in bfloat16 they do on the
CPUs seen so far, in float32 they do not; ``selftest`` prints it). For its sake ranges of keys over a cache begin and
end at multiples of ``KEY_GRID``, for the softmax adds its terms in lanes. So cached decoding is bit by bit the forward
of the whole row, if that takes products, too (it has ``KEY_GRID`` to ``PRODUCTS_REACH`` positions) and windows are
multiples of ``KEY_GRID``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_pl.common.compiling import constant_in_graphs
from nanochat_pl.model.config import KEY_GRID

# Queries of a block: with plain products always, with sdpa where the window is narrower.
BLOCK = 128
DOCUMENTS_BLOCK = 512
PRODUCTS_REACH = 1024

# Queries start … stop - 1, and the keys first … last - 1 that they are held against.
Block: TypeAlias = tuple[int, int, int, int]

Backend = Literal["products", "sdpa", "varlen", "bands"]


class Kernels(NamedTuple):
    """What of a device and of PyTorch the choice depends on."""

    device_type: str
    capability: tuple[int, int] | None = None  # of a GPU of NVIDIA; None: it is none
    varlen: bool = False  # whether PyTorch has flash kernels with windows


def why_not(
    kernels: Kernels, dtype: torch.dtype, window: int, length: int, head_dim: int, documents: bool = False
) -> dict[Backend, str | None]:
    """What speaks against each backend, in the order of preference; None: nothing, so the first such is taken."""
    whole = window >= length - 1 and not documents
    return {
        "products": None
        if kernels.device_type == "cpu" and length <= PRODUCTS_REACH
        else f"it is for CPUs and rows of at most {PRODUCTS_REACH:,} positions",
        "sdpa": None if whole else "a mask would shut its flash kernels out",
        "varlen": "the window is the whole row: sdpa has the same kernels"
        if whole
        else "the number of documents would be a shape"
        if documents
        else no_varlen(kernels, dtype, head_dim),
        "bands": None,
    }


def no_varlen(kernels: Kernels, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why flash kernels with windows are not to be had; None: they are."""
    if kernels.device_type != "cuda" or kernels.capability is None:
        return "it is for GPUs of NVIDIA"
    if kernels.capability < (8, 0):
        return "it needs compute capability 8.0, the GPU has {}.{}".format(*kernels.capability)
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    # Of the backward of wider heads only the data center's GPUs have enough shared memory for.
    widest = 256 if kernels.capability in ((8, 0), (9, 0), (10, 0)) else 192
    if head_dim % 8 or head_dim > widest:
        return f"it takes heads whose width is a multiple of 8 up to {widest}, not {head_dim}"
    if not kernels.varlen:
        return f"PyTorch {torch.__version__} has no varlen_attn with windows"
    return None


def attention_backend(
    kernels: Kernels, dtype: torch.dtype, window: int, length: int, head_dim: int, documents: bool = False
) -> Backend:
    """The first backend that nothing speaks against."""
    reasons = why_not(kernels, dtype, window, length, head_dim, documents)
    return next(backend for backend, reason in reasons.items() if reason is None)


def kernels_of(device: torch.device) -> Kernels:
    """What a device has."""
    if device.type != "cuda" or torch.version.hip:
        return Kernels(device.type)
    return Kernels("cuda", torch.cuda.get_device_capability(device), has_varlen_with_windows())


@functools.cache
def has_varlen_with_windows() -> bool:
    """Whether this PyTorch has ``varlen_attn`` with all that is asked of it: the signature tells, not the version."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "scale", "enable_gqa"} <= {*inspect.signature(varlen_attn).parameters}


@constant_in_graphs
def _backend_on(
    device: torch.device, dtype: torch.dtype, window: int, length: int, head_dim: int, documents: bool
) -> Backend:
    return attention_backend(kernels_of(device), dtype, window, length, head_dim, documents)


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, documents: Tensor | None = None
) -> Tensor:
    """Attention of each position to itself and the ``window`` positions before it.

    Args:
        q: (B, H, T, D).
        k, v: (B, G, T, D); query head h uses key/value head h // (H / G).
        window: in positions; T - 1 or more is full causal attention.
        scale: factor on the scores.
        documents: int (B, T), number of each position's document in its row, which never falls: a position sees those
            of its own alone. None: all of a row are of one.

    Returns:
        (B, H, T, D)
    """
    length = q.size(2)
    backend = _backend_on(q.device, q.dtype, window, length, q.size(3), documents is not None)
    if backend == "sdpa":
        return sdpa(q, k, v, scale, causal=True)
    if backend == "varlen":
        return varlen(q, k, v, window, scale)
    with_products = backend == "products"
    bands = band_blocks(length, window, with_products, documents is not None)
    blocks = [(start, stop, first, stop) for start, stop, first in bands]

    def mask_of(start: int, stop: int, first: int, last: int) -> Tensor:
        mask = band_mask(stop - start, last - first, start - first, window, q.device)
        if documents is None:
            return mask
        mask = mask & (documents[:, start:stop, None] == documents[:, None, first:last])
        return mask[:, None, None] if with_products else mask[:, None]

    return in_blocks(q, k, v, scale, blocks, mask_of, with_products)


def in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    blocks: Sequence[Block],
    mask_of: Callable[[int, int, int, int], Tensor | None],
    with_products: bool,
) -> Tensor:
    """Attention of blocks of queries, each to a range of keys: the one function of training, prefill and decoding.

    Args:
        q: (B, H, Tq, D).
        k, v: (B, G, Tk, D).
        blocks: which together have all queries.
        mask_of: a block's mask, as :func:`products` or :func:`sdpa` takes it.
        with_products: which of the two it is.

    Returns:
        (B, H, Tq, D)
    """
    outputs = []
    for start, stop, first, last in blocks:
        keys, values, mask = k[:, :, first:last], v[:, :, first:last], mask_of(start, stop, first, last)
        outputs.append(in_one_block(q[:, :, start:stop], keys, values, scale, mask, with_products))
    return torch.cat(outputs, dim=2)


def in_one_block(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, with_products: bool) -> Tensor:
    """Attention of a block of queries to the keys that one of them can see. Shapes as of :func:`sdpa`."""
    if with_products:
        assert mask is not None
        return products(q, k, v, scale, mask)
    return sdpa(q, k, v, scale, mask)


def cache_blocks(
    num_queries: int, starts: tuple[int, int], window: int, length: int, with_products: bool, least: int = 0
) -> list[Block]:
    """The blocks of new tokens over a cache of ``length`` positions; ``starts``: the lowest and highest of the rows.

    With products, one query is held against at least so many keys.
    """
    blocks = []
    for start in range(0, num_queries, BLOCK):
        stop = min(start + BLOCK, num_queries)
        first, last = max(0, starts[0] + start - window), starts[1] + stop
        if with_products:
            last = max(last, first + -(-least // (stop - start)))
            first, last = first // KEY_GRID * KEY_GRID, -(-last // KEY_GRID) * KEY_GRID
            first = max(0, min(first, length - -(-least // KEY_GRID) * KEY_GRID))
        blocks.append((start, stop, first, min(last, length)))
    return blocks


def band_blocks(length: int, window: int, with_products: bool, documents: bool = False) -> list[tuple[int, int, int]]:
    """Blocks of queries (start, stop), each with the first of the keys up to ``stop`` that one of them can see.

    ``documents``: each row has masks of its own, so the blocks are no larger than ``DOCUMENTS_BLOCK``.
    """
    block = BLOCK if with_products else max(window, BLOCK)
    if documents:
        block = min(block, DOCUMENTS_BLOCK)
    return [(start, min(start + block, length), max(0, start - window)) for start in range(0, length, block)]


def band_mask(num_queries: int, num_keys: int, offset: int, window: int, device: torch.device) -> Tensor:
    """bool (num_queries, num_keys): query i is at key position i + offset and sees itself and ``window`` before it."""
    queries = torch.arange(num_queries, device=device)[:, None] + offset
    keys = torch.arange(num_keys, device=device)
    return (keys <= queries) & (keys >= queries - window)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """PyTorch's attention. q (B, H, Tq, D), k and v (B, G, Tk, D), mask bool (…, Tq, Tk) → (B, H, Tq, D)."""
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def varlen(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """PyTorch's flash kernels with a window, which take all rows as one long text with ends. Shapes as in
    :func:`windowed_attention`."""
    from torch.nn.attention.varlen import varlen_attn

    rows, _, length, _ = q.shape
    ends = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=q.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    grouped = q.size(1) != k.size(1)
    y = varlen_attn(q, k, v, ends, ends, length, length, scale=scale, window_size=(window, 0), enable_gqa=grouped)
    return cast(Tensor, y).unflatten(0, (rows, length)).transpose(1, 2)


def products(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Scores, softmax in float32, weighted sum. Shapes as in :func:`sdpa`.

    The mask broadcasts to (B, G, H/G, Tq, Tk). It is bool, or what is added to the scores: float32, 0 or -inf; the
    result has the same bits.
    """
    batch, _, queries, width = q.shape
    # Queries that share keys are rows of one product: (B · G, H/G · Tq, D).
    rows, keys, values = q.reshape(batch * k.size(1), -1, width), k.flatten(0, 1), v.flatten(0, 1)
    scores = torch.bmm(rows, keys.transpose(1, 2)).view(batch, k.size(1), -1, queries, k.size(2))
    if mask.is_floating_point():
        scores = torch.add(mask, scores, alpha=scale)  # one operation for three: it is what decoding has many of
    else:
        scores = (scores.float() * scale).masked_fill(~mask, -torch.inf)
    shares = scores.softmax(dim=-1).to(v.dtype)
    return torch.bmm(shares.view(len(rows), -1, k.size(2)), values).view(batch, -1, queries, width)
