"""Devices as a plan sees them: memory, peak rate, bandwidth. Detected, or taken by name from a table of known GPUs.

A fact that is not known is None and stays so: no time, no MFU and no batch is made up from a guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from nanochat_pl.common.device_settings import ComputeDType
from nanochat_pl.common.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import torch

DeviceType = Literal["cpu", "cuda", "mps"]


class KnownGPU(NamedTuple):
    """A line of the table. Rates are those of dense matrix products; None: the hardware has no units for the type."""

    name: str  # how hardware=… names it
    words: str  # that all occur in the name by which PyTorch reports it
    memory_gib: float  # as PyTorch reports it, error correction taken off where it is on by default
    bandwidth_gb: float  # GB/s
    bfloat16: float | None  # TFLOP/s
    float16: float  # TFLOP/s
    float32: float  # TFLOP/s, without TF32: the training does not switch it on


# From the vendors' data sheets. The first line whose words all occur holds, so the special ones come first.
KNOWN_GPUS = (
    KnownGPU("gb200", "gb200", 185.0, 8000, 2500.0, 2500.0, 80.0),
    KnownGPU("b200", "b200", 179.0, 7700, 2250.0, 2250.0, 75.0),
    KnownGPU("h200-nvl", "h200 nvl", 139.5, 4800, 835.5, 835.5, 60.0),
    KnownGPU("h200", "h200", 139.5, 4800, 989.4, 989.4, 67.0),
    KnownGPU("h100-nvl", "h100 nvl", 93.0, 3900, 835.5, 835.5, 60.0),
    KnownGPU("h100-pcie", "h100 pcie", 79.0, 2039, 756.0, 756.0, 51.0),
    KnownGPU("h100", "h100", 79.0, 3350, 989.4, 989.4, 67.0),
    KnownGPU("gh200", "gh200", 95.0, 4000, 989.4, 989.4, 67.0),
    KnownGPU("h20", "h20", 95.0, 4000, 148.0, 148.0, 44.0),
    KnownGPU("a100-80gb", "a100 80gb", 79.0, 2039, 312.0, 312.0, 19.5),
    KnownGPU("a100-40gb", "a100", 39.5, 1555, 312.0, 312.0, 19.5),
    KnownGPU("a800", "a800", 79.0, 2039, 312.0, 312.0, 19.5),
    KnownGPU("a40", "a40", 44.5, 696, 149.7, 149.7, 37.4),
    KnownGPU("a30", "a30", 23.5, 933, 165.0, 165.0, 10.3),
    KnownGPU("a10g", "a10g", 22.0, 600, 70.0, 70.0, 35.0),
    KnownGPU("a10", "a10", 22.0, 600, 125.0, 125.0, 31.2),
    KnownGPU("l40s", "l40s", 44.5, 864, 362.0, 362.0, 91.6),
    KnownGPU("l40", "l40", 44.5, 864, 181.0, 181.0, 90.5),
    KnownGPU("l4", "l4", 22.0, 300, 121.0, 121.0, 30.3),
    KnownGPU("rtx-6000-ada", "rtx 6000 ada", 47.5, 960, 364.0, 364.0, 91.1),
    KnownGPU("rtx-a6000", "rtx a6000", 47.5, 768, 154.8, 154.8, 38.7),
    KnownGPU("rtx-5090", "rtx 5090", 31.5, 1792, 209.5, 209.5, 104.8),
    KnownGPU("rtx-4090", "rtx 4090", 23.5, 1008, 165.2, 165.2, 82.6),
    KnownGPU("rtx-3090-ti", "rtx 3090 ti", 23.5, 1008, 80.0, 80.0, 40.0),
    KnownGPU("rtx-3090", "rtx 3090", 23.5, 936, 71.0, 71.0, 35.6),
    KnownGPU("v100-32gb", "v100 32gb", 31.5, 900, None, 125.0, 15.7),
    KnownGPU("v100-16gb", "v100", 15.5, 900, None, 125.0, 15.7),
    KnownGPU("t4", "t4", 14.5, 320, None, 65.0, 8.1),
    KnownGPU("mi300x", "mi300x", 191.5, 5300, 1307.4, 1307.4, 163.4),
    KnownGPU("mi325x", "mi325x", 255.5, 6000, 1307.4, 1307.4, 163.4),
)
# Those with units for FP8 that the training can use: of NVIDIA, compute capability 8.9 or higher.
FP8_GPUS = frozenset(
    (
        *("gb200", "b200", "h200-nvl", "h200", "h100-nvl", "h100-pcie", "h100", "gh200", "h20"),
        *("l40s", "l40", "l4", "rtx-6000-ada", "rtx-5090", "rtx-4090"),
    )
)
# Parts of a GPU, and the sisters in laptops and for certain markets, are slower than what they are named after.
OTHER_KINDS = frozenset(("mig", "laptop", "max", "d"))


@dataclass(frozen=True)
class Device:
    """What the plan needs to know of a device; None where it is not known.

    Attributes:
        memory_bytes: what there is, not what is free.
        peaks: FLOP/s of dense matrix products by compute type.
        bandwidth: bytes per second between memory and processor.
    """

    name: str
    type: DeviceType
    memory_bytes: int | None = None
    peaks: Mapping[ComputeDType, float] = field(default_factory=dict)
    bandwidth: float | None = None
    bfloat16: bool = False
    fp8: bool = False

    @property
    def gpu_memory(self) -> int | None:
        """Bytes, of a GPU that has memory of its own."""
        return self.memory_bytes if self.type == "cuda" else None


CPU = Device("a CPU", "cpu")


def detected_device(device: torch.device) -> Device:
    """A device of this machine, with the facts of the table where it is in it."""
    # With torch, which the settings and a plan for a device by its name do without.
    from nanochat_pl.common.device import device_name, has_bfloat16, has_fp8, memory_bytes

    name = device_name(device)
    known = _find_gpu(name) if device.type == "cuda" else None
    return Device(
        name,
        cast(DeviceType, device.type),
        memory_bytes(device),
        {} if known is None else _peaks(known),
        None if known is None else known.bandwidth_gb * 1e9,
        has_bfloat16(device),
        has_fp8(device),
    )


def named_device(name: str) -> Device:
    """A GPU by a name of the table (``h100``, ``a100-80gb``), or by the one that PyTorch reports.

    Raises:
        UserError: the table does not have it, or has several of that name.
    """
    names = [gpu.name for gpu in KNOWN_GPUS]
    wanted = name.strip().lower()
    known = next((gpu for gpu in KNOWN_GPUS if gpu.name == wanted), None)
    if known is None:
        several = sorted(each for each in names if each.startswith(f"{wanted}-"))
        if several:
            raise UserError(f"hardware={name}: there are {' and '.join(several)}.", fix=f"Say hardware={several[0]}.")
        known = _find_gpu(name)
    if known is None:
        near = did_you_mean(wanted, names)
        hint = near if near.startswith("did") else "no facts are known of it."
        raise UserError(
            f"hardware={name}: is not in the table of known GPUs; {hint}",
            fix=f"Known: {', '.join(names)}. Without hardware= the plan is for this machine.",
        )
    return Device(
        known.name,
        "cuda",
        int(known.memory_gib * 2**30),
        _peaks(known),
        known.bandwidth_gb * 1e9,
        known.bfloat16 is not None,
        known.name in FP8_GPUS,
    )


def peak_flops(name: str, dtype: ComputeDType) -> float | None:
    """Peak FLOP/s of a GPU by the name that PyTorch reports, dense matrix products; None where it is not known."""
    known = _find_gpu(name)
    return None if known is None else _peaks(known).get(dtype)


def _find_gpu(name: str) -> KnownGPU | None:
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if words & OTHER_KINDS:
        return None
    return next((gpu for gpu in KNOWN_GPUS if words.issuperset(gpu.words.split())), None)


def _peaks(gpu: KnownGPU) -> dict[ComputeDType, float]:
    rates: dict[ComputeDType, float | None] = {
        "bfloat16": gpu.bfloat16,
        "float16": gpu.float16,
        "float32": gpu.float32,
    }
    return {dtype: rate * 1e12 for dtype, rate in rates.items() if rate is not None}
