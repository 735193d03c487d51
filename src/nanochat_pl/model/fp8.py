"""Linear maps whose matrix products are in FP8, with one scale for each tensor, for training.

A tensor is scaled so that its largest magnitude is the largest number of the type, and rounded: inputs and weights to
e4m3, gradients to e5m2, which has fewer digits and a wider range. Scales are computed anew in each product (dynamic,
tensorwise scaling); a value that is not finite makes its product not finite, so an overflow is noticed as ever.

The product of the head is not among them: in training that is part of the loss (``model/loss.py``).

Source: arXiv 2209.05433, torchao's ``tensorwise`` recipe.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from nanochat_pl.common.device import FP8_CAPABILITY, has_fp8
from nanochat_pl.common.errors import first_line

# ``scaled_mm``: PyTorch's kernels; ``emulate``: the same rounding, with products in float32, on any device.
Fp8Backend: TypeAlias = Literal["scaled_mm", "emulate"]

INPUT_DTYPE, GRADIENT_DTYPE = torch.float8_e4m3fn, torch.float8_e5m2
# Sides of a weight: the kernels want multiples of 16, and for small ones scaling costs more than the product saves.
MULTIPLE, MIN_SIDE = 16, 128
_SMALLEST_AMAX = 1e-30  # of a tensor of zeros, whose scale would be infinite; gradients of long steps are small
_PROOF_TOLERANCE = 1e-2  # relative; the rounding of products to bfloat16 is 2e-3


def suits_fp8(weight: Tensor) -> bool:
    """Whether a weight (outputs, inputs) is multiplied in FP8."""
    return all(side >= MIN_SIDE and side % MULTIPLE == 0 for side in weight.shape)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in an FP8 type, and the float32 scalar that undoes its scaling."""
    largest = torch.finfo(dtype).max
    amax = x.abs().amax().float().clamp(min=_SMALLEST_AMAX)
    # Clamped, since what is rounded up beyond the largest number is no number in e4m3; clamp keeps NaN.
    scaled = (x.float() * (largest / amax)).clamp(-largest, largest)
    return scaled.to(dtype), amax / largest


def product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, backend: Fp8Backend, fast: bool = False
) -> Tensor:
    """(n, k) times (k, m), both in FP8, scaled back, in ``dtype``.

    Args:
        a: contiguous.
        b: the transpose of a contiguous one.
        fast: add up with fewer digits, as is usual in the forward.
    """
    if backend == "emulate":
        return ((a.float() @ b.float()) * (scale_a * scale_b)).to(dtype)
    return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, backend: Fp8Backend) -> Tensor:
        # From the weight as it is kept: one rounding less than by way of the type of the activations.
        (x8, scale_x), (w8, scale_w) = quantize(x, INPUT_DTYPE), quantize(weight, INPUT_DTYPE)
        ctx.save_for_backward(x8, scale_x, w8, scale_w)
        ctx.backend, ctx.weight_dtype = backend, weight.dtype
        return product(x8, w8.t(), scale_x, scale_w, x.dtype, backend, fast=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x8, scale_x, w8, scale_w = ctx.saved_tensors
        g8, scale_g = quantize(gradient, GRADIENT_DTYPE)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = product(g8, w8.t().contiguous().t(), scale_g, scale_w, gradient.dtype, ctx.backend)
        if ctx.needs_input_grad[1]:
            inputs = x8.t().contiguous().t()
            of_weight = product(g8.t().contiguous(), inputs, scale_g, scale_x, ctx.weight_dtype, ctx.backend)
        return of_x, of_weight, None


def fp8_linear(x: Tensor, weight: Tensor, backend: Fp8Backend) -> Tensor:
    """x (…, inputs) times the transpose of weight (outputs, inputs), in the type of x, with gradients.

    The rows of x must be a multiple of 16 in number, as the sides of the weight: they are the inner dimension of the
    product that gives the weight's gradient.
    """
    y = _Fp8Linear.apply(x.reshape(-1, x.size(-1)), weight, backend)
    return cast(Tensor, y).view(*x.shape[:-1], -1)


def why_no_fp8(device: torch.device, dtype: torch.dtype, sequence_len: int, emulated: bool = False) -> str | None:
    """What speaks against training in FP8 on a device, in a few words; None: nothing.

    Args:
        dtype: of the activations.
        emulated: whether it is to be emulated, which needs no hardware.
    """
    if dtype != torch.bfloat16:
        return f"it is for a model that computes in bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if sequence_len % MULTIPLE:
        return f"it needs a model.sequence_len that is a multiple of {MULTIPLE}, not {sequence_len}"
    if emulated:
        return None
    if device.type != "cuda" or torch.version.hip:
        return "it is for GPUs of NVIDIA"
    if not has_fp8(device):
        capability = torch.cuda.get_device_capability(device)
        return "it needs compute capability {}.{}, the GPU has {}.{}".format(*FP8_CAPABILITY, *capability)
    try:
        far = distance_of_kernels(device)
    except (RuntimeError, TypeError, AttributeError) as error:  # of the library, or of another PyTorch's signature
        return f"its kernels do not run here: {first_line(error)[:160]}"
    return None if far <= _PROOF_TOLERANCE else f"its kernels are {far:.1e} off"


def distance_of_kernels(device: torch.device) -> float:
    """Relative L2 distance of output and gradients by ``scaled_mm`` from those by ``emulate``, of a small product."""
    generator = torch.Generator().manual_seed(0)
    x, weight, given = (
        torch.randn(shape, generator=generator).to(device) for shape in ((64, 128), (256, 128), (64, 256))
    )
    found = []
    for backend in get_args(Fp8Backend):
        inputs = x.bfloat16().requires_grad_(), weight.clone().requires_grad_()
        with torch.enable_grad():
            y = fp8_linear(*inputs, backend)
            gradients = torch.autograd.grad(y, inputs, given.bfloat16())
        found.append(torch.cat([each.detach().float().flatten() for each in (y, *gradients)]))
    return float((found[1] - found[0]).norm() / found[0].norm())
