"""The MFU that `make bench-gpu` measured, for a plan: the training whose depth is nearest, on that very GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_pl.common.errors import UserError
from nanochat_pl.planning.gpus import Device, named_device

VERSION = 1
MEASURE = (
    "It is the file that `make bench-gpu` writes, or any text whose last line is that of benchmarks/gpu/bench_gpu.py."
)


class MeasuredMFU(NamedTuple):
    """A share of the peak, and of which training."""

    mfu: float
    depth: int
    fp8: bool

    @property
    def in_words(self) -> str:
        """How it came about."""
        return f"measured at depth {self.depth}{' in FP8' if self.fp8 else ''}"


def measured_mfu(path: Path, device: Device, depth: int, fp8: bool) -> MeasuredMFU:
    """What a file of measurements says of trainings like one that is planned.

    Args:
        path: of the file.
        device: that is planned for.
        depth: of the model.
        fp8: whether its blocks multiply in FP8: such a measurement goes before others.

    Raises:
        UserError: it cannot be read, is of another GPU, or no training was measured.
    """
    whole = _last_line(path)
    if whole.get("version") != VERSION:
        raise UserError(f"bench={path}: has version {whole.get('version')}; this program reads {VERSION}.", fix=MEASURE)
    measured_on = str(whole.get("device"))
    if _table_name(measured_on) != _table_name(device.name):
        raise UserError(f"bench={path}: was measured on {measured_on}, and the plan is for {device.name}.")
    parts = whole.get("parts")
    found = [_of_part(part) for part in parts.values()] if isinstance(parts, dict) else []
    known = [each for each in found if each is not None]
    if not known:
        raise UserError(f"bench={path}: has no training whose MFU was measured.", fix=MEASURE)
    return min(known, key=lambda each: (each.fp8 != fp8, abs(each.depth - depth)))


def _of_part(part: Any) -> MeasuredMFU | None:
    if not isinstance(part, dict):
        return None
    mfu, depth, fp8 = (part.get(key) for key in ("mfu", "depth", "fp8"))
    if not (isinstance(mfu, float) and isinstance(depth, int) and isinstance(fp8, bool)):
        return None  # a part that measures something else, or did not come to it
    return MeasuredMFU(mfu, depth, fp8) if math.isfinite(mfu) and 0 < mfu <= 1 else None


def _last_line(path: Path) -> dict[str, Any]:
    try:
        lines = path.read_text(encoding="utf-8").strip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"bench={path}: cannot be read: {error}.", fix=MEASURE) from error
    try:
        whole = json.loads(lines[-1]) if lines else None
    except ValueError:
        whole = None
    if not isinstance(whole, dict):
        raise UserError(f"bench={path}: its last line is not what the benchmark writes.", fix=MEASURE)
    return whole


def _table_name(name: str) -> str:
    """The name in the table of known GPUs; of others their own."""
    try:
        return named_device(name).name
    except UserError:
        return name
