"""What a check of the self-test gives, and the checks of one process: its device and what that computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from nanochat_pl.common.device import device_name, has_bfloat16, memory_bytes
from nanochat_pl.common.device_settings import ComputeDType
from nanochat_pl.common.errors import first_line
from nanochat_pl.common.files import free_bytes
from nanochat_pl.common.launch_env import launch_env
from nanochat_pl.model.attention import Case
from nanochat_pl.model.attention.choice import refusals, use_newest_kernels
from nanochat_pl.model.config import ModelSettings
from nanochat_pl.model.fp8 import why_no_fp8
from nanochat_pl.model.gpt import TORCH_DTYPES
from nanochat_pl.selftest.batch_invariance import describe
from nanochat_pl.training.compile_proof import (
    config_of_its_kind,
    distance_of_compiled,
    loss_and_gradients,
    tolerance,
)
from nanochat_pl.training.tiny_steps import distance, rows, tiny_net

MIN_BYTES = 2**30  # of memory and of free disk


class Finding(NamedTuple):
    """One line of the table."""

    check: str
    result: Literal["ok", "FAILED", "left out"]
    metric: str
    tolerance: str = ""


@dataclass(frozen=True)
class Setup:
    """What is tested.

    Attributes:
        device: of this process.
        dtype: in which it would train.
        accelerator: the setting that the device was chosen by.
        runs: the folder in which resume files would be.
        caches: the folder of the data caches.
        software: versions and source, which have to be the same in all processes.
    """

    device: torch.device
    dtype: ComputeDType
    accelerator: str
    runs: Path
    caches: Path
    software: str


class Check(NamedTuple):
    """A function that finds something out, and whether the processes speak to each other in it."""

    name: str
    function: Callable[[Setup], Sequence[Finding]]
    has_collectives: bool = False


def within(check: str, error: float, most: float, what: str = "") -> Finding:
    """A finding by a number that must not be above another (NaN is)."""
    return Finding(check, "ok" if error <= most else "FAILED", f"{error:.1e}{what}", f"{most:.0e}")


def exact(check: str, wrong: Sequence[str], metric: str) -> Finding:
    """A finding by what should have been and was not: ``wrong`` in words."""
    return Finding(check, "FAILED" if wrong else "ok", "; ".join(wrong) or metric, "exact")


def check_device(setup: Setup) -> list[Finding]:
    """Which device this process has, of which there are, and the type and kernels that it computes with."""
    device = setup.device
    if device.type == "cuda":
        others = f"of {torch.cuda.device_count()} that this process sees"
    else:
        others = "there are GPUs" if torch.cuda.is_available() else "PyTorch sees no GPU"
    chosen = f"accelerator={setup.accelerator}" + (": the best there is" if setup.accelerator == "auto" else "")
    x = torch.arange(4.0, device=device)
    right = float((x * x).sum()) == 14
    why = "has units for bfloat16" if has_bfloat16(device) else "has no units for bfloat16"
    return [
        Finding("device", "ok" if right else "FAILED", f"{device} ({device_name(device)}); {chosen}; {others}"),
        Finding("compute type", "ok", f"{setup.dtype}: the device {why}"),
        Finding("FP8", "ok", _fp8(setup)),
    ]


def _fp8(setup: Setup) -> str:
    """Whether a training may multiply in FP8 (trainer.fp8), by a small product against plain arithmetic."""
    reason = why_no_fp8(setup.device, TORCH_DTYPES[setup.dtype], ModelSettings().sequence_len)
    return "its kernels are right" if reason is None else f"not used: {reason}"


def check_attention(setup: Setup) -> list[Finding]:
    """What computes attention in a training of the default size, each tried forward and backward; and why not what
    would come before it."""
    settings, dtype, findings = ModelSettings(), TORCH_DTYPES[setup.dtype], []
    length, head_dim, on_gpu = settings.sequence_len, settings.head_dim, setup.device.type == "cuda"
    if on_gpu:
        words = _taken(use_newest_kernels(setup.device, dtype, head_dim, documents=True).items(), "PyTorch's own")
        findings.append(Finding("flash kernels", "ok", words))
    for what, window, documents in (
        ("in windows", length // 4, False),
        ("over whole rows", length, False),
        ("within documents", length, True),
    ):
        case = Case(dtype, window, length, head_dim, documents, compiled=on_gpu)
        reasons = dict(refusals(setup.device, case))
        words, found = _taken(reasons.items(), "none"), None in reasons.values()
        findings.append(Finding(f"attention {what}", "ok" if found else "FAILED", words))
    return findings


def _taken(reasons: Iterable[tuple[str, str | None]], otherwise: str) -> str:
    """The first that nothing speaks against, and why not those before it."""
    refused: list[str] = []
    for name, reason in reasons:
        if reason is None:
            return f"{name} ({'; '.join(refused)})" if refused else name
        refused.append(f"not {name}: {reason}")
    return f"{otherwise} ({'; '.join(refused)})"


def check_memory(setup: Setup) -> list[Finding]:
    """Memory of the device and free space of the disks: less than a gigabyte is no machine to train on."""
    memory = memory_bytes(setup.device)
    metric = f"{memory / 2**30:,.1f} GiB"
    if setup.device.type == "cuda":
        metric += f", {torch.cuda.mem_get_info(setup.device)[0] / 2**30:,.1f} GiB of it free"
    findings = [Finding("memory", "ok" if memory >= MIN_BYTES else "FAILED", metric, ">= 1 GiB")]
    for name, folder in (("disk of runs", setup.runs), ("disk of caches", setup.caches)):
        free = free_bytes(folder)
        metric = f"{free / 2**30:,.1f} GiB free at {folder}"
        findings.append(Finding(name, "ok" if free >= MIN_BYTES else "FAILED", metric, ">= 1 GiB"))
    return findings


def check_gradients(setup: Setup) -> list[Finding]:
    """The tiny model's loss and gradients in each type that trainings use, against float32 on the CPU."""
    inputs, targets = rows()
    on_cpu = tiny_net(torch.device("cpu"))
    expected = loss_and_gradients(on_cpu.loss_by_row, on_cpu, inputs, targets)
    findings = []
    for name in dict.fromkeys(("float32", setup.dtype)):
        net = tiny_net(setup.device, TORCH_DTYPES[name])
        found = loss_and_gradients(net.loss_by_row, net, inputs.to(setup.device), targets.to(setup.device))
        findings.append(within(f"loss and gradients in {name}", distance(found, expected), tolerance(name)))
    return findings


def check_compile(setup: Setup) -> list[Finding]:
    """Loss and gradients of a compiled layer against the uncompiled one, in the type of the training.

    By the first process of each node alone: compiling keeps all cores busy.
    """
    if launch_env().local_rank > 0:
        return []
    config = config_of_its_kind(ModelSettings(), setup.dtype)
    try:
        error = distance_of_compiled(tiny_net(setup.device, TORCH_DTYPES[setup.dtype], config=config))
    except Exception as raised:  # whatever a missing compiler, header or library makes of it
        return [Finding("torch.compile", "left out", f"{first_line(raised)[:160]}; trainings are not compiled")]
    return [within("torch.compile", error, tolerance(setup.dtype), f" in {setup.dtype}")]


def check_batch_invariance(setup: Setup) -> list[Finding]:
    """Where results depend on what is computed beside them: information, for no machine is wrong for what it has."""
    names = dict.fromkeys(("float32", setup.dtype))
    return [Finding(f"batch invariance of {name}", "ok", describe(TORCH_DTYPES[name], setup.device)) for name in names]


CHECKS = (
    Check("device", check_device),
    Check("attention", check_attention),
    Check("memory", check_memory),
    Check("loss and gradients", check_gradients),
    Check("batch invariance", check_batch_invariance),
    Check("torch.compile", check_compile),
)
