"""Windowed attention against a dense mask, its memory, and which backend is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention.varlen
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat_pl.model import attention
from nanochat_pl.model.attention import Kernels, attention_backend, no_varlen, why_not, windowed_attention


def dense(q, k, v, window, scale):
    groups = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    distance = torch.arange(q.size(2))[:, None] - torch.arange(q.size(2))
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill((distance < 0) | (distance > window), -torch.inf)
    return scores.softmax(dim=-1) @ v


@pytest.mark.parametrize("reach", [0, 1024], ids=["sdpa", "products"])
@pytest.mark.parametrize("window", [0, 1, 127, 128, 129, 150, 298, 299, 300, 10_000])
def test_equals_a_dense_mask_forward_and_backward(window, reach, monkeypatch):
    monkeypatch.setattr(attention, "PRODUCTS_REACH", reach)
    generator = torch.Generator().manual_seed(window)
    shapes = [(2, 4, 300, 8), (2, 2, 300, 8), (2, 2, 300, 8)]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    outputs = [function(*inputs, window, 0.5) for function in (windowed_attention, dense)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(output.square().sum(), inputs) for output in outputs]
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("reach", [0, 4096], ids=["sdpa", "products"])
def test_no_mask_of_the_whole_row_for_a_small_window(reach, monkeypatch):
    """Elsewhere a T × T mask was built for a window of a few percent of T."""
    monkeypatch.setattr(attention, "PRODUCTS_REACH", reach)
    length, window = 4096, 128
    q, k, v = (torch.randn(1, 1, length, 8) for _ in range(3))
    with LargestTensor() as seen:
        windowed_attention(q, k, v, window, 1.0)
    assert seen.largest <= 4 * window * window


HOPPER, BF16 = Kernels("cuda", (9, 0), True), torch.bfloat16


@pytest.mark.parametrize(
    ("kernels", "dtype", "window", "length", "head_dim", "backend"),
    [
        (Kernels("cpu"), BF16, 512, 1024, 128, "products"),
        (Kernels("cpu"), BF16, 1024, 1024, 128, "products"),
        (Kernels("cpu"), BF16, 512, 2048, 128, "bands"),
        (Kernels("cpu"), torch.float32, 2048, 2048, 128, "sdpa"),
        (HOPPER, BF16, 512, 2048, 128, "varlen"),
        (HOPPER, torch.float16, 512, 2048, 128, "varlen"),
        (Kernels("cuda", (8, 0), True), BF16, 2046, 2048, 256, "varlen"),
        (Kernels("cuda", (12, 0), True), BF16, 512, 2048, 192, "varlen"),
        (HOPPER, BF16, 2047, 2048, 128, "sdpa"),
        (HOPPER, torch.float32, 512, 2048, 128, "bands"),
        (HOPPER, BF16, 512, 2048, 12, "bands"),
        (Kernels("cuda", (8, 9), True), BF16, 512, 2048, 256, "bands"),
        (Kernels("cuda", (7, 5), True), torch.float16, 512, 2048, 128, "bands"),
        (Kernels("cuda", (9, 0), False), BF16, 512, 2048, 128, "bands"),
        (Kernels("cuda", None, True), BF16, 512, 2048, 128, "bands"),
        (Kernels("mps"), torch.float32, 512, 2048, 128, "bands"),
    ],
)
def test_which_backend_is_taken(kernels, dtype, window, length, head_dim, backend):
    assert attention_backend(kernels, dtype, window, length, head_dim) == backend
    reasons = why_not(kernels, dtype, window, length, head_dim)
    before = [*reasons][: [*reasons].index(backend)]
    assert all(reasons[each] for each in before), "what comes before it and is not taken says why"


@pytest.mark.parametrize(
    ("kernels", "dtype", "head_dim", "word"),
    [
        (Kernels("cpu"), BF16, 128, "NVIDIA"),
        (Kernels("cuda", (7, 5), True), torch.float16, 128, "the GPU has 7.5"),
        (HOPPER, torch.float32, 128, "not in float32"),
        (HOPPER, BF16, 12, "not 12"),
        (Kernels("cuda", (9, 0), False), BF16, 128, torch.__version__),
    ],
)
def test_why_there_are_no_flash_kernels_with_windows(kernels, dtype, head_dim, word):
    assert word in no_varlen(kernels, dtype, head_dim)


def test_an_older_varlen_attn_without_windows_is_told_by_its_signature(monkeypatch):
    attention.has_varlen_with_windows.cache_clear()
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda query, key, value, scale=None: query)
    assert not attention.has_varlen_with_windows()
    attention.has_varlen_with_windows.cache_clear()


def dense_varlen(query, key, value, ends, ends_of_keys, most, max_keys, *, scale, window_size, enable_gqa):
    """What PyTorch's varlen_attn promises: texts one after the other, (tokens, heads, width)."""
    assert ends.dtype == torch.int32 and torch.equal(ends, ends_of_keys) and most == max_keys
    assert enable_gqa == (query.size(1) != key.size(1)) and window_size[1] == 0
    outputs = []
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        assert stop - start <= most
        q, k, v = (tensor[start:stop].transpose(0, 1)[None] for tensor in (query, key, value))
        outputs.append(dense(q, k, v, window_size[0], scale)[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 1, 7, 30])
def test_rows_are_handed_to_the_flash_kernels_as_they_want_them(window, kv_heads, monkeypatch):
    """Without a GPU: with a plain function in their place."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", dense_varlen)
    monkeypatch.setattr(attention, "_backend_on", lambda *facts: "varlen")
    inputs = leaves(window, kv_heads, 32, "cpu", torch.float64)
    check_against(windowed_attention, dense, inputs, window, 1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 1, 100, 128, 129, 298])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_kernels_with_windows_against_plain_products(window, kv_heads, dtype):
    device = torch.device("cuda")
    if reason := no_varlen(attention.kernels_of(device), dtype, 64):
        pytest.skip(reason)
    inputs = leaves(window, kv_heads, 300, device, dtype)
    mask = attention.band_mask(300, 300, 0, window, device)
    check_against(
        windowed_attention, lambda q, k, v, w, scale: attention.products(q, k, v, scale, mask), inputs, window, 2e-2
    )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"])
@pytest.mark.parametrize("window", [100, 299])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_backend_of_sdpa_against_plain_products(dtype, window, backend):
    device, whole = torch.device("cuda"), window == 299
    inputs = leaves(window, 4, 300, device, dtype)
    mask = attention.band_mask(300, 300, 0, window, device)

    def with_backend(q, k, v, window, scale):
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            return attention.sdpa(q, k, v, scale, None if whole else mask, causal=whole)

    def plain(q, k, v, window, scale):
        return attention.products(q, k, v, scale, mask)

    try:
        check_against(with_backend, plain, inputs, window, 2e-5 if dtype == torch.float32 else 2e-2)
    except RuntimeError as error:
        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
            raise
        pytest.skip(f"{backend} is not offered for this")


def leaves(seed, kv_heads, length, device, dtype):
    """Queries, keys and values of two rows, as the model makes them: (B, T, H, D) seen as (B, H, T, D)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, length, heads, 64) for heads in (4, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def check_against(function, expected_of, inputs, window, tolerance):
    """Output and gradients, relative distances."""
    results = []
    for way in (function, expected_of):
        output = way(*(x.transpose(1, 2) for x in inputs), window, 0.2)
        results.append([output, *torch.autograd.grad(output.float().square().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
