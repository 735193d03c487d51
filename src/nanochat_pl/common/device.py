"""What this machine can do: the device to use, the type to compute in, its memory.

Everything is found out when asked, nothing at import.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from nanochat_pl.common.compiling import constant_in_graphs
from nanochat_pl.common.device_settings import ComputeDType
from nanochat_pl.common.errors import UserError
from nanochat_pl.common.launch_env import usable_cpus

FP8_CAPABILITY = (8, 9)


def choose_device(name: str = "auto", key: str = "device") -> torch.device:
    """The device that a setting means.

    Args:
        name: ``auto`` (a GPU where there is one, else the CPU), ``gpu`` (cuda or mps), ``cpu``, ``cuda``, ``cuda:1`` or
            ``mps``.
        key: of the setting, for messages; ``device`` is an argument's name.

    Raises:
        UserError: there is no such device, here or at all.
    """
    if name in ("auto", "gpu"):
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "gpu" and found == "cpu":
            raise UserError(f"{key}=gpu: PyTorch sees no GPU on this machine.", fix=f"Use {key}=auto.")
        name = found
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name):
        raise UserError(f"{key}={name!r}: must be auto, cpu, gpu, cuda, cuda:N or mps.")
    kind, _, index = name.partition(":")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"{key}=mps: this machine has no Apple GPU that PyTorch can use.", fix=f"Use {key}=auto.")
    # The number as typed: torch.device keeps it in eight bits, where 999 is negative.
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"{key}={name}: PyTorch sees {torch.cuda.device_count()} CUDA devices.", fix=f"Use {key}=auto.")
    return torch.device(name)


def num_devices(wanted: int | Literal["auto"], device: torch.device, key: str) -> int:
    """How many devices of this machine a command takes, one for each of its processes.

    Args:
        wanted: the setting; ``auto``: all GPUs, one CPU.
        device: of the kind that is meant. Of CPUs each process takes one, two on any machine, for a try.
        key: of the setting, for messages.

    Raises:
        UserError: there are not so many.
    """
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if wanted == "auto":
        return there
    if device.type != "cpu" and wanted > there:
        raise UserError(
            f"{key}={wanted}: PyTorch sees {there} {'CUDA device' if device.type == 'cuda' else 'Apple GPU'}"
            f"{'s' if there > 1 else ''} on this machine.",
            fix=f"Use {key}=auto.",
        )
    if device.type == "cpu" and wanted > (most := max(2, usable_cpus())):
        raise UserError(
            f"{key}={wanted}: this program may use {usable_cpus()} CPUs here, and more processes would only wait for"
            " each other.",
            fix=f"Use {key}={most} or fewer.",
        )
    return wanted


def choose_compute_dtype(name: str, device: torch.device, trained_in: str | None = None) -> ComputeDType:
    """The type of the activations that ``model.compute_dtype`` means on a device.

    ``auto`` is bfloat16 where the hardware multiplies matrices in it, else float16 where it does that, else float32.

    Args:
        name: auto, or the type itself.
        trained_in: of a trained model, what it was trained in. In float16, whose largest number is 65,504, ``auto`` has
            it compute only where it was trained in that: a training notices an overflow, an answer does not. None: it
            is to be trained.
    """
    if name == "auto":
        if has_bfloat16(device):
            return "bfloat16"
        return "float16" if has_float16_alone(device) and trained_in in (None, "float16") else "float32"
    if name not in get_args(ComputeDType):
        raise UserError(f"compute_dtype={name!r}: must be auto, {', '.join(get_args(ComputeDType))}.")
    return cast(ComputeDType, name)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for bfloat16; a mere emulation does not count."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and cpu_has_bfloat16()


def has_fp8(device: torch.device) -> bool:
    """Whether the device is a GPU of NVIDIA with units for FP8 (e4m3 and e5m2)."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def has_float16_alone(device: torch.device) -> bool:
    """Whether the device has units for matrices in float16 and none for bfloat16, as V100 and T4."""
    return device.type == "cuda" and (7, 0) <= torch.cuda.get_device_capability(device) < (8, 0)


def require_kernels(device: torch.device) -> None:
    """Refuse a GPU that the installed PyTorch has no code for: it would fail at its first operation.

    Raises:
        UserError: that is so.
    """
    if device.type != "cuda":
        return
    capability, built_for = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if not has_kernels(capability, built_for):
        raise UserError(
            f"{device_name(device)} has compute capability {capability[0]}.{capability[1]}; the installed PyTorch"
            f" {torch.__version__} has code for {', '.join(built_for)} only.",
            fix="Install a PyTorch that is built for this GPU (https://pytorch.org/get-started/locally has a choice of"
            " CUDA versions; the oldest ones are for old GPUs, the newest for new ones), or use the CPU:"
            " trainer.accelerator=cpu for a training, else accelerator=cpu.",
        )


def has_kernels(capability: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether code for one of these architectures runs on a GPU of this compute capability.

    ``sm_86`` runs on 8.6 and on later GPUs of the same generation, ``compute_86`` on all later ones (it is translated),
    ``sm_90a`` on 9.0 alone. What has other names (``gfx942``) is not judged, nor is an empty list.
    """
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name) for name in built_for]
    known = [match for match in found if match]
    if not known or len(known) < len(found):
        return True
    for kind, generation, number, only in (match.groups() for match in known):
        code_for = int(generation), int(number)
        same_generation = code_for[0] == capability[0]
        if only == "a":
            runs = code_for == capability
        else:
            runs = code_for <= capability and (same_generation or (kind == "compute" and not only))
        if runs:
            return True
    return False


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has AVX512-BF16, AMX-BF16 or ARM's BF16 instructions. False where that cannot be told."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _text_of(cpuinfo), flags=re.MULTILINE)
    words = set(found.group(1).split()) if found else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Of the processor its name and instructions, in the words of Linux; elsewhere only what kind it is."""
    lines = re.findall(r"^(?:model name|CPU part|flags|Features)\s*:\s*(.*)$", _text_of(cpuinfo), flags=re.MULTILINE)
    return "; ".join(dict.fromkeys([platform.machine(), *lines]))


def _text_of(cpuinfo: Path) -> str:
    """What Linux says of the processors; empty elsewhere."""
    try:
        return cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def memory_bytes(device: torch.device | None = None) -> int:
    """Memory of a GPU, or of the machine; 64 GiB where the system does not say."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if not hasattr(os, "sysconf"):
        return 2**36
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@constant_in_graphs
def gpu_memory_bytes(device: torch.device) -> int:
    """Memory of a GPU of its own; 0 for all else."""
    return memory_bytes(device) if device.type == "cuda" else 0


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
