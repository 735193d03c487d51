"""Which backend computes attention: the first, in a fixed order, that nothing speaks against and that is right here.

What speaks against one follows from device, type, window and PyTorch alone (:func:`why_not`), so a plan can say it of a
machine that is not at hand. Before one is taken, it computes a small case on the very device, forward and backward, and
is held against plain products (:func:`what_is_wrong`), once in a process.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from nanochat_pl.common.compiling import constant_in_graphs
from nanochat_pl.common.errors import UserError, first_line
from nanochat_pl.model.attention import blocks, flex, fused, plain, varlen
from nanochat_pl.model.attention.backend import Backend, BackendName, Case, Documents, Kernels, nothing
from nanochat_pl.model.attention.varlen import document_ends, has_varlen_with_windows
from nanochat_pl.model.config import AttentionBackend

# In the order of preference.
BACKENDS: dict[BackendName, Backend] = {
    each.name: each
    for each in (
        Backend("products", blocks.attend_with_products, nothing, plain.unwanted),
        Backend("sdpa", fused.attend, fused.cannot, nothing),
        Backend("varlen", varlen.attend, varlen.cannot, varlen.unwanted),
        Backend("flex", flex.attend, flex.cannot, flex.unwanted),
        Backend("bands", blocks.attend_with_sdpa, nothing, nothing),
    )
}
# Of the case that a backend is tried with: rows, query heads, positions; and the window, where it has one.
TRIED_SHAPE, TRIED_WINDOW = (2, 4, 200), 70
# Largest distance of its output and gradients from those of products in float32, relative (L2).
TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def why_not(kernels: Kernels, case: Case) -> dict[BackendName, str | None]:
    """What speaks against each backend without trying it, in the order of preference; None: nothing."""
    return {name: backend.why_not(kernels, case) for name, backend in BACKENDS.items()}


def attention_backend(kernels: Kernels, case: Case, wanted: AttentionBackend = "auto") -> BackendName:
    """The first backend that nothing speaks against; where it can compute the case, the wanted one."""
    if wanted != "auto" and BACKENDS[wanted].cannot(kernels, case) is None:
        return wanted
    return next(name for name, backend in BACKENDS.items() if backend.why_not(kernels, case) is None)


def kernels_of(device: torch.device) -> Kernels:
    """What a device has."""
    if device.type != "cuda" or torch.version.hip:
        return Kernels(device.type, flex=flex.has_flex_attention())
    capability = torch.cuda.get_device_capability(device)
    return Kernels("cuda", capability, has_varlen_with_windows(), flex.has_flex_attention())


@constant_in_graphs
def choose_in_graph(device: torch.device, wanted: AttentionBackend, *case: Any) -> BackendName:
    """:func:`choose`, with the fields of the case one by one: a compiler takes plain values only."""
    return choose(device, Case(*case), wanted)


def choose(device: torch.device, case: Case, wanted: AttentionBackend = "auto") -> BackendName:
    """The backend that is taken on a device. Which ones are wrong here is found out when they are first asked for.

    Raises:
        UserError: all are.
    """
    reasons = dict(refusals(device, case, wanted))
    name, reason = reasons.popitem()
    if reason is not None:
        problems = [f"attention on {device}: {each}: {why}." for each, why in [*reasons.items(), (name, reason)]]
        raise UserError(problems, fix="nanochat-pl selftest shows what else is wrong with this device.")
    return name


def refusals(
    device: torch.device, case: Case, wanted: AttentionBackend = "auto"
) -> Iterator[tuple[BackendName, str | None]]:
    """What speaks against each backend on a device, up to the first that nothing speaks against: that one is taken."""
    kernels = kernels_of(device)
    if wanted != "auto" and BACKENDS[wanted].cannot(kernels, case) is None:
        # The command has refused one that is wrong here (`require`).
        yield wanted, None
        return
    for name, backend in BACKENDS.items():
        reason = backend.why_not(kernels, case) or _what_is_wrong(name, device, case)
        yield name, reason
        if reason is None:
            return


def require(device: torch.device, cases: Iterable[Case], wanted: AttentionBackend, key: str) -> None:
    """Refuse a wanted backend that takes none of the cases on a device, or is wrong there; ``key`` is its setting.

    Raises:
        UserError: it is so, and why.
    """
    if wanted == "auto":
        return
    kernels, cases = kernels_of(device), list(cases)
    impossible = [BACKENDS[wanted].cannot(kernels, case) for case in cases]
    possible = [case for case, reason in zip(cases, impossible, strict=True) if reason is None]
    reasons = [_what_is_wrong(wanted, device, case) for case in possible] if possible else impossible
    if wrong := [reason for reason in reasons if reason is not None]:
        raise UserError(f"{key}={wanted}: {wrong[0]}.", fix=f"Leave it out, or set {key}=auto.")


def use_newest_kernels(
    device: torch.device, dtype: torch.dtype, head_dim: int, documents: bool
) -> dict[str, str | None]:
    """Let the newest FlashAttention that is installed and right compute what flash kernels of this process compute.

    Returns:
        what speaks against each of :data:`~nanochat_pl.model.attention.varlen.NEWER_KERNELS`; None: it is active.
    """
    traits = (dtype, TRIED_WINDOW, TRIED_SHAPE[2], head_dim)
    if (reason := BACKENDS["varlen"].cannot(kernels_of(device), Case(*traits))) is not None:
        return dict.fromkeys(varlen.NEWER_KERNELS, reason)

    def works() -> str | None:
        what_is_wrong.cache_clear()
        whole = what_is_wrong("sdpa", device, dtype, head_dim, True, False, False)
        return whole or what_is_wrong("varlen", device, dtype, head_dim, False, documents, False)

    try:
        return varlen.activate_newer_kernels(device, works)
    finally:
        what_is_wrong.cache_clear()  # of kernels that may not be active any more


def _what_is_wrong(name: BackendName, device: torch.device, case: Case) -> str | None:
    if name == "products" or device.type == "meta":  # the yardstick; and there nothing is computed
        return None
    compiled = case.compiled and name == "flex"  # the others compute the same in a graph
    return what_is_wrong(name, device, case.dtype, case.head_dim, case.is_causal_alone, case.documents, compiled)


@functools.cache
def what_is_wrong(
    name: BackendName,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    causal_alone: bool,
    documents: bool,
    compiled: bool,
) -> str | None:
    """Try a backend with a small case, forward and backward, against plain products in float32; None: it is right.

    With a window (unless it is ``causal_alone``), grouped queries and, if asked for, documents.
    """
    try:
        # Whoever keeps or counts saved tensors outside does not mean those of a trial.
        apart = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        with torch.inference_mode(False), torch.enable_grad(), apart:
            far = _distance_from_products(BACKENDS[name], device, dtype, head_dim, causal_alone, documents, compiled)
    except Exception as error:  # whatever a missing kernel, compiler or library makes of it: that is the reason
        return f"it does not run here: {first_line(error)[:160]}"
    most = TOLERANCE[dtype]
    return None if far <= most else f"its output or gradients are {far:.1e} off, more than {most:.0e}"


def _distance_from_products(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    causal_alone: bool,
    documents: bool,
    compiled: bool,
) -> float:
    rows, heads, length = TRIED_SHAPE
    window, scale = length if causal_alone else TRIED_WINDOW, head_dim**-0.5
    inputs = [_pattern((rows, length, number, head_dim), number, device) for number in (heads, heads // 2, heads // 2)]
    weights = _pattern((rows, heads, length, head_dim), 7, device)
    cuts = None
    if documents:
        places = torch.arange(length, device=device).expand(rows, -1) + torch.arange(rows, device=device)[:, None] * 9
        numbers = (places // 37).int()
        cuts = Documents(numbers, document_ends(numbers))

    def results(attend: Backend, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        function = torch.compile(attend.attend, dynamic=False) if compiled and attend is backend else attend.attend
        q, k, v = (leaf.transpose(1, 2) for leaf in leaves)
        y = function(q, k, v, window, scale, cuts)
        return [y.detach(), *torch.autograd.grad((y.float() * weights).sum(), leaves)]

    found, expected = results(backend, dtype), results(BACKENDS["products"], torch.float32)
    return max(
        float((ours.float() - theirs).norm() / theirs.norm()) for ours, theirs in zip(found, expected, strict=True)
    )


def _pattern(shape: tuple[int, ...], number: int, device: torch.device) -> Tensor:
    """float32, in (-1, 1), another for each number: no generator is touched."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(index * (1.3 + 0.1 * number) + number).reshape(shape).float().to(device)
