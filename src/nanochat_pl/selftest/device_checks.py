"""The checks that a process makes by itself: what its device computes, held against the plain thing on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat_pl.common.constants import IGNORE_INDEX
from nanochat_pl.common.device import device_name, has_bfloat16, memory_bytes
from nanochat_pl.common.errors import first_line
from nanochat_pl.common.files import free_bytes
from nanochat_pl.common.launch_env import launch_env
from nanochat_pl.model import attention
from nanochat_pl.model.config import ModelSettings
from nanochat_pl.model.gpt import TORCH_DTYPES
from nanochat_pl.model.loss import fused_linear_cross_entropy
from nanochat_pl.selftest.checks import Bench, Check, Finding, within
from nanochat_pl.training.compile_proof import distance_of_compiled, tolerance, why_not_compiled
from nanochat_pl.training.tiny_steps import TOLERANCE, distance, pattern, rows, tiny_net

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
LENGTH, WINDOW, HEAD_DIM = 320, 100, 32
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def check_device(bench: Bench) -> list[Finding]:
    """Which devices there are, which one this process has, and the type that it computes in, with the reasons."""
    if bench.device.type == "cuda":
        there = f"of {torch.cuda.device_count()} that this process sees"
    else:
        there = "PyTorch sees no GPU" if not torch.cuda.is_available() else "there are GPUs"
    chosen = f"accelerator={bench.accelerator}" + (": the best there is" if bench.accelerator == "auto" else "")
    why = "has units for bfloat16" if has_bfloat16(bench.device) else "has no units for bfloat16"
    x = torch.arange(4.0, device=bench.device)
    figure = f"{bench.device} ({device_name(bench.device)}); {chosen}; {there}"
    return [
        Finding("device", "ok" if float((x * x).sum()) == 14 else "FAILED", figure),
        Finding("compute type", "ok", f"{bench.dtype}: the device {why}"),
    ]


def check_memory(bench: Bench) -> list[Finding]:
    """Memory of the device and free space of the disks: less than a gigabyte is no machine to train on."""
    memory = memory_bytes(bench.device)
    figure = f"{memory / 2**30:,.1f} GiB"
    if bench.device.type == "cuda":
        free = torch.cuda.mem_get_info(bench.device)[0]
        figure += f", {free / 2**30:,.1f} GiB of it free"
    findings = [Finding("memory", "ok" if memory >= 2**30 else "FAILED", figure, ">= 1 GiB")]
    for name, folder in (("disk of runs", bench.runs), ("disk of caches", bench.caches)):
        free = free_bytes(folder)
        figure = f"{free / 2**30:,.1f} GiB free at {folder}"
        findings.append(Finding(name, "ok" if free >= 2**30 else "FAILED", figure, ">= 1 GiB"))
    return findings


def check_attention(bench: Bench) -> list[Finding]:
    """Attention as it is trained with, and each backend that the device offers: forward and gradients."""
    findings = [_kernels_in_windows(bench)]
    for dtype in dict.fromkeys((torch.float32, TORCH_DTYPES[bench.dtype])):
        ways: dict[str, Callable[[int], Attend]] = {"as trained": _as_trained, "plain products": _products}
        ways |= {f"sdpa, {name}": _with_backend(backend) for name, backend in BACKENDS.items()}
        if attention.no_varlen(attention.kernels_of(bench.device), dtype, HEAD_DIM) is None:
            ways["varlen"] = _varlen
        findings += [line for name, way in ways.items() for line in _check_way(name, way, dtype, bench.device)]
    return findings


def _kernels_in_windows(bench: Bench) -> Finding:
    """What the windowed layers of a training run on, and why not on what comes before it."""
    shape = (TORCH_DTYPES[bench.dtype], WINDOW, ModelSettings().sequence_len, ModelSettings().head_dim)
    words: list[str] = []
    for backend, reason in attention.why_not(attention.kernels_of(bench.device), *shape).items():
        if reason is None:
            return Finding("attention in windows", "ok", f"{backend} ({'; '.join(words)})" if words else backend)
        words.append(f"not {backend}: {reason}")
    raise AssertionError("bands run everywhere")


def _check_way(name: str, way: Callable[[int], Attend], dtype: torch.dtype, device: torch.device) -> list[Finding]:
    """The line of one way in one type, over the whole row and in a window; none where the device offers neither."""
    check = f"attention in {_name(dtype)}: {name}"
    try:
        errors = [_attention_error(way(window), window, dtype, device) for window in (LENGTH, WINDOW)]
    except RuntimeError as error:  # a backend that says it can and then cannot
        return [Finding(check, "FAILED", first_line(error)[:200])]
    offered = [error for error in errors if error is not None]
    if not offered:
        return []
    only = "" if len(offered) == 2 else ", without a window" if errors[1] is None else ", with a window"
    return [within(check, max(offered), TOLERANCE[dtype], only)]


def _as_trained(window: int) -> Attend:
    return lambda q, k, v: attention.windowed_attention(q, k, v, window, HEAD_DIM**-0.5)


def _products(window: int) -> Attend:
    return lambda q, k, v: attention.products(q, k, v, HEAD_DIM**-0.5, _mask(window, q.device))


def _varlen(window: int) -> Attend:
    return lambda q, k, v: attention.varlen(q, k, v, window, HEAD_DIM**-0.5)


def _with_backend(backend: SDPBackend) -> Callable[[int], Attend]:
    def way(window: int) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            causal = window >= LENGTH
            with sdpa_kernel([backend]):
                mask = None if causal else _mask(window, q.device)
                return attention.sdpa(q, k, v, HEAD_DIM**-0.5, mask, causal)

        return attend

    return way


def _mask(window: int, device: torch.device) -> Tensor:
    return attention.band_mask(LENGTH, LENGTH, 0, window, device)


def _attention_error(attend: Attend, window: int, dtype: torch.dtype, device: torch.device) -> float | None:
    """Relative distance of output and gradients from the plain way in float64; None: the device does not offer it."""
    shape = (2, 4, LENGTH, HEAD_DIM)
    tensors = [pattern(shape, number).to(dtype) for number in range(3)]
    slope = pattern(shape, 3).to(dtype)
    expected = _with_gradients(_plain_attention(window), [tensor.double() for tensor in tensors], slope.double())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a backend that is not offered says why
            found = _with_gradients(attend, [tensor.to(device) for tensor in tensors], slope.to(device))
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            return None
        raise
    return max(distance([one], [other]) for one, other in zip(found, expected, strict=True))


def _plain_attention(window: int) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-2, -1)) * HEAD_DIM**-0.5
        place = torch.arange(LENGTH)
        behind = place[:, None] - place
        return scores.masked_fill((behind < 0) | (behind > window), -torch.inf).softmax(dim=-1) @ v

    return attend


def _with_gradients(attend: Attend, tensors: Sequence[Tensor], slope: Tensor) -> list[Tensor]:
    inputs = [tensor.requires_grad_() for tensor in tensors]
    output = attend(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, slope)]


def check_dtypes(bench: Bench) -> list[Finding]:
    """The tiny model's logits in each type of activations against float32 on the CPU."""
    inputs, _ = rows()
    with torch.no_grad():
        expected = tiny_net(torch.device("cpu"))(inputs)
        findings = []
        for name in ["float32"] if bench.device.type == "mps" else TORCH_DTYPES:
            dtype = TORCH_DTYPES[name]  # type: ignore[index]
            found = tiny_net(bench.device, dtype)(inputs.to(bench.device))
            findings.append(within(f"logits in {name}", distance([found], [expected]), 3 * TOLERANCE[dtype]))
    return findings


def check_loss(bench: Bench) -> list[Finding]:
    """Loss and gradients made piece by piece against the plain cross entropy in float64."""
    width, vocabulary, cap = 48, 90, 15.0
    hidden, head = pattern((75, width), 0), 0.5 * pattern((96, width), 1)
    targets = torch.arange(75) * 7 % vocabulary
    targets[::9] = IGNORE_INDEX
    x, matrix = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    capped = cap * torch.tanh(x @ matrix[:vocabulary].T / cap)
    plain = F.cross_entropy(capped, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    expected = [plain.detach(), *torch.autograd.grad(plain, (x, matrix))]
    leaves = [tensor.float().to(bench.device).requires_grad_() for tensor in (hidden, head)]
    weights, goals = torch.ones(75, device=bench.device), targets.to(bench.device)
    worst = 0.0
    for chunk in (7, 32, 75):
        nats, _ = fused_linear_cross_entropy(
            leaves[0], leaves[1], goals, weights, vocab_size=vocabulary, cap=cap, chunk_tokens=chunk
        )
        found = [nats.detach(), *torch.autograd.grad(nats, leaves)]
        worst = max(worst, *(distance([one], [other]) for one, other in zip(found, expected, strict=True)))
    return [within("loss in pieces, gradients", worst, TOLERANCE[torch.float32])]


def check_compile(bench: Bench) -> list[Finding]:
    """Loss and gradients of a compiled layer against the uncompiled one, in the type of the training.

    By the first process of each node alone: compiling keeps all cores busy.
    """
    if launch_env().local_rank > 0:
        return []
    net = tiny_net(bench.device, TORCH_DTYPES[bench.dtype], depth=1)
    try:
        far = distance_of_compiled(net)
    except Exception:  # whatever a missing compiler, header or library makes of it
        reason = why_not_compiled(bench.device, bench.dtype, ModelSettings())
        if reason is None:
            raise
        return [Finding("torch.compile", "left out", f"{reason}; trainings are not compiled")]
    return [within("torch.compile", far, tolerance(bench.dtype), f" in {bench.dtype}")]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CHECKS = (
    Check("device", check_device),
    Check("memory", check_memory),
    Check("attention", check_attention),
    Check("logits", check_dtypes),
    Check("loss", check_loss),
    Check("torch.compile", check_compile),
)
