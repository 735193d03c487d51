"""Windowed attention against a dense mask, and its memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat_pl.model import attention
from nanochat_pl.model.attention import windowed_attention


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
